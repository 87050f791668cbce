"""Which ranks share a copy of the tables, and where their lookups run: made once per model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ultramem_ds.sharding.comm import Comm, split_ranks
from ultramem_ds.sharding.execution import (
    Clock,
    ClockedExecutor,
    Executor,
    make_executor,
    no_clock,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


CPU = torch.device("cpu")


@dataclass(frozen=True)
class TableGroups:
    """The groups of all value tables of a model.

    Attributes:
        shard: the ranks that share one copy, P of them.
        replicas: the ranks that hold this rank's block in the other copies.
        executor: runs the lookups of this copy, in one order on all its ranks.
    """

    shard: Comm
    replicas: Comm
    executor: Executor


def make_groups(
    shard_group_size: int = 0,
    *,
    asynchronous: bool = False,
    device: torch.device = CPU,
    clock: Clock = no_clock,
    group: ProcessGroup | None = None,
) -> TableGroups:
    """Makes the groups; all ranks of ``group`` together.

    Args:
        shard_group_size: ``memory.shard_group_size``, ranks per copy; 0 = all.
        asynchronous: ``memory.async_lookup``, lookups run beside the blocks between a and b.
        device: where this rank computes.
        clock: runs while a lookup keeps its caller waiting.
        group: the data-parallel group; None is the world.

    Raises:
        ValueError: the size does not divide the number of ranks.
    """
    shard, replicas = split_ranks(shard_group_size, group)
    return TableGroups(shard, replicas, ClockedExecutor(make_executor(asynchronous, device), clock))
