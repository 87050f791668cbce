"""Where the ranks meet, and what keeps them from waiting there for ever.

PyTorch's ranks wait without a word for a rank 0 that is not there, and for ever at a port where
another program answers.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator

import psutil

from ultramem_ds.utils.environment import World, world_of
from ultramem_ds.utils.ports import free_port, is_taken

WAIT_S = 600.0  # for the last rank to start; machines of a job come up minutes apart
LOOKS, LOOK_S = 5, 0.2  # at a port that somebody unknown listens at


@contextlib.contextmanager
def meeting_point(world: World) -> Iterator[None]:
    """Make sure that there is one, while the block runs.

    Raises:
        ValueError: another program has the port; found in a moment.
    """
    if not world.master_addr:
        with _meeting_itself():
            yield
        return
    # Under torchrun the agent listens already, for its ranks.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and _is_anothers(world):
        raise ValueError(
            f"port {world.master_port} of {world.master_addr} is taken by another program: set "
            "MASTER_PORT to a free one, the same for all ranks"
        )
    yield


@contextlib.contextmanager
def _meeting_itself() -> Iterator[None]:
    """What a launcher would have set for one process."""
    ours = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _is_anothers(world: World) -> bool:
    """Whether something else listens at the port; other ranks see it only on rank 0's machine.

    They look more than once: of a socket that rank 0 opens or closes meanwhile nobody can say whose
    it is.
    """
    if world.rank == 0:
        return is_taken(world.master_port)
    if world.local_size < world.size:
        return False
    for _ in range(LOOKS):
        listeners = _listeners(world.master_port)
        if not listeners or any(_is_rank_0(pid, world) for pid in listeners):
            return False
        time.sleep(LOOK_S)
    return True


def _listeners(port: int) -> list[int | None]:
    """Processes that listen at ``port``; None: nobody can say which."""
    return [
        connection.pid
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    ]


def _is_rank_0(pid: int | None, world: World) -> bool:
    """Whether a process was started as rank 0 of this world."""
    if pid is None:  # of another user
        return False
    try:
        other = world_of(psutil.Process(pid).environ())
    except (psutil.Error, ValueError):
        return False
    return (other.rank, other.size, other.master_port) == (0, world.size, world.master_port)


@contextlib.contextmanager
def giving_up(world: World, wait_s: float = WAIT_S) -> Iterator[None]:
    """End this process if the block, in which it meets the others, does not end in time."""

    def end() -> None:
        print(
            f"error: rank {world.rank} of {world.size} has waited {wait_s:.0f} s at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} for the others: were all "
            "started, with the same MASTER_ADDR and MASTER_PORT, and can this machine reach that?",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    timer = threading.Timer(wait_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
