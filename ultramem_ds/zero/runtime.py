"""Start and stop the process group: the same under any launcher and plain Python."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch

from ultramem_ds.utils.environment import World, adopt
from ultramem_ds.zero.deepspeed_import import deepspeed
from ultramem_ds.zero.rendezvous import giving_up, meeting_point


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


def _cuda_device(world: World) -> torch.device:
    """This rank's device; where each rank is shown one device of its own, that one.

    Raises:
        ValueError: there are more ranks here than devices.
    """
    count = torch.cuda.device_count()
    index = 0 if count == 1 and os.environ.get("CUDA_VISIBLE_DEVICES") else world.local_rank
    if index >= count:
        raise ValueError(
            f"rank {world.rank} is number {world.local_rank} on a machine that shows {count} GPUs: "
            "start as many ranks as it has"
        )
    return torch.device("cuda", index)


@contextlib.contextmanager
def runtime(timeout_s: float = 1800.0) -> Iterator[Ranks]:
    """Join the process group, and leave it at the end.

    Args:
        timeout_s: after this many seconds without progress a collective raises.

    Yields:
        Where this process stands.

    Raises:
        ValueError: it does not know where, or cannot meet the others.
    """
    world = adopt()
    cuda = torch.cuda.is_available()
    device = _cuda_device(world) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(meeting_point(world))
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        with contextlib.redirect_stdout(sys.__stderr__), giving_up(world):
            deepspeed.init_distributed(
                "nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout_s), verbose=False
            )
        stack.callback(_leave)
        yield Ranks(
            rank=world.rank,
            world_size=world.size,
            local_rank=world.local_rank,
            device=device,
        )


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
