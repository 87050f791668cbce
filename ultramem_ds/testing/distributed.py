"""Runs a function on several real ranks of this machine and brings back what they returned.

    def body(rank: int, world_size: int, value: int) -> int:
        ...                                     # torch.distributed is initialised here
    results = run_ranks(body, 4, 7)             # results[rank]

The first failing rank's traceback is what the caller sees; ranks that hang are killed at the
time-out and the error shows where each of them was.
"""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

# Slow imports that every engine makes, done once for all ranks of all calls.
PRELOADED = ("torch.distributed", "ultramem_ds.zero.deepspeed_import")

GRACE_S = 2.0  # how long other ranks may take to report after the first failure


class RankFailureError(AssertionError):
    """One rank raised, died or hung; the message holds its traceback."""


def run_ranks(
    body: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 300.0,
    backend: Literal["gloo", "nccl"] = "gloo",
) -> list[Any]:
    """Calls ``body(rank, world_size, *args)`` on ``world_size`` ranks.

    Args:
        body: a module-level function; its result must pickle.
        world_size: number of processes.
        *args: handed to every rank, pickled.
        timeout_s: wall-clock limit for all ranks together, start-up included.
        backend: with nccl rank i computes on GPU i, which is set before anything asks for memory.

    Returns:
        What each rank returned, in rank order.

    Raises:
        RankFailureError: a rank raised (its traceback is the message), died or ran out of time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    # Port 0: the system picks a free one, and the parent holds it before any rank starts.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="ultramem-ranks-") as scratch:
        pipes: dict[int, Connection] = {}
        processes = []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main,
                args=(
                    sender,
                    body,
                    rank,
                    world_size,
                    args,
                    store.port,
                    scratch,
                    timeout_s,
                    backend,
                ),
                daemon=True,
            )
            process.start()
            sender.close()
            pipes[rank] = receiver
            processes.append(process)
        try:
            return _collect(pipes, processes, Path(scratch), timeout_s)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _collect(
    pipes: dict[int, Connection], processes: list[Any], scratch: Path, timeout_s: float
) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    pending = dict(pipes)
    while pending:
        ready = wait(list(pending.values()), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for rank in [rank for rank, pipe in pending.items() if pipe in ready]:
            pipe = pending.pop(rank)
            try:
                succeeded, payload = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join(GRACE_S)
                succeeded, payload = False, f"died with exit code {processes[rank].exitcode}"
            if succeeded:
                results[rank] = payload
            else:
                failures[rank] = payload
                deadline = min(deadline, time.monotonic() + GRACE_S)
    if failures:
        raise RankFailureError(
            "\n".join(f"rank {rank}: {failures[rank]}" for rank in sorted(failures))
        )
    if pending:
        for rank in pending:
            os.kill(processes[rank].pid, signal.SIGUSR1)  # asks for its stack
        time.sleep(GRACE_S / 2)
        stacks = "\n".join(
            f"rank {rank} was at:\n{(scratch / f'stack-{rank}').read_text()}"
            for rank in sorted(pending)
            if (scratch / f"stack-{rank}").exists()
        )
        raise RankFailureError(
            f"ranks {sorted(pending)} did not finish within {timeout_s} s\n{stacks}"
        )
    return [results[rank] for rank in sorted(results)]


def _rank_main(
    pipe: Connection,
    body: Callable[..., Any],
    rank: int,
    world_size: int,
    args: tuple[Any, ...],
    port: int,
    scratch: str,
    timeout_s: float,
    backend: str,
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    with open(os.path.join(scratch, f"stack-{rank}"), "w") as stack_file:
        faulthandler.register(signal.SIGUSR1, file=stack_file)
        try:
            if backend == "nccl":
                torch.cuda.set_device(rank)
            limit = datetime.timedelta(seconds=timeout_s)
            dist.init_process_group(
                backend,
                store=dist.TCPStore("127.0.0.1", port, is_master=False, timeout=limit),
                rank=rank,
                world_size=world_size,
                timeout=limit,
            )
            report = (True, body(rank, world_size, *args))
            dist.destroy_process_group()
        except BaseException:  # the parent decides; nothing may be lost with this process
            report = (False, traceback.format_exc())
        finally:
            faulthandler.unregister(signal.SIGUSR1)
    # Plain pickle: tensors travel as bytes, not as handles that die with this process.
    pipe.send_bytes(pickle.dumps(report))
    pipe.close()
    # Skips the joins of helper threads, which never end on a rank whose peers are gone.
    os._exit(0 if report[0] else 1)
