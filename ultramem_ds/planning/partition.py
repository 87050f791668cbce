"""Which partition scheme a run uses: as asked for, or the one with the least predicted time."""

from __future__ import annotations

import sys

import torch

from ultramem_ds.config.schema import Config
from ultramem_ds.planning.memory import value_bytes
from ultramem_ds.planning.planner import possible_schemes, resolve_partition
from ultramem_ds.planning.rates import run_rates
from ultramem_ds.sharding.comm import Comm
from ultramem_ds.sharding.groups import TableGroups


def decide_partition(config: Config, world: Comm, groups: TableGroups, device: torch.device) -> str:
    """``memory.partition`` of a run, auto resolved by this machine's rates; a collective.

    Nothing is measured where there is nothing to choose. Rank 0 decides for all, and says on
    stderr what it chose and by which rates.

    Args:
        config: one with memory layers.
        world: all ranks.
        groups: who shares a copy of the tables.
        device: where this rank computes.

    Raises:
        ValueError: the scheme asked for cannot be used, or ``memory.rates_file`` cannot be read.
    """
    ranks = groups.shard.world_size
    if config.memory.partition != "auto" or len(possible_schemes(config, ranks)) == 1:
        return resolve_partition(config, world.world_size)
    rates = run_rates(config.memory, world, groups.shard, device, value_bytes(config))
    chosen: str = world.from_first(resolve_partition(config, world.world_size, rates))
    if world.rank == 0:
        print(f"memory.partition=auto is {chosen}: {rates}", file=sys.stderr, flush=True)
    return chosen
