"""Start and stop the process group: the same under ``deepspeed``, ``torchrun`` and plain Python."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch

from ultramem_ds.zero.deepspeed_import import deepspeed


@dataclass(frozen=True)
class Ranks:
    """Where this process stands.

    Attributes:
        rank: index among all processes.
        world_size: number of processes P.
        local_rank: index on this machine.
        device: where this process computes.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and files that exist once."""
        return self.rank == 0


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _single_process_environment() -> None:
    """What a launcher would have set; DeepSpeed would look for MPI instead."""
    if "RANK" in os.environ:
        return
    os.environ.update(
        RANK="0",
        WORLD_SIZE="1",
        LOCAL_RANK="0",
        LOCAL_WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(_free_port()),
    )


@contextlib.contextmanager
def runtime(timeout_s: float = 1800.0) -> Iterator[Ranks]:
    """Join the process group, and leave it at the end.

    Args:
        timeout_s: after this many seconds without progress a collective raises.

    Yields:
        Where this process stands.
    """
    _single_process_environment()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with contextlib.redirect_stdout(sys.stderr):
        deepspeed.init_distributed(
            "nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout_s), verbose=False
        )
    try:
        yield Ranks(
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            local_rank=local_rank,
            device=device,
        )
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
