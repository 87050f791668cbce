"""This rank's block of every value table, filled and installed; no rank ever holds more."""

from __future__ import annotations

import torch
from torch import nn

from ultramem_ds.config.schema import Config
from ultramem_ds.kernels.hugepages import advise_huge_pages
from ultramem_ds.model.init import fill_block
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.optim.row_adam import ROW_OPTIMIZERS
from ultramem_ds.sharding.comm import Comm
from ultramem_ds.sharding.groups import TableGroups
from ultramem_ds.sharding.lookup import build_lookup
from ultramem_ds.sharding.shard import TableShard
from ultramem_ds.sharding.table_plan import TableSpec, shard_layout
from ultramem_ds.zero.nvme import NvmeTables
from ultramem_ds.zero.row_sparse import RowSparseShard, RowSparseTables
from ultramem_ds.zero.runtime import Ranks
from ultramem_ds.zero.tables import Zero3Tables, install_shard, shard_reader


def shard_tables(
    model: LanguageModel,
    config: Config,
    ranks: Ranks,
    groups: TableGroups,
    partition: str,
    on_nvme: bool,
) -> Zero3Tables:
    """Give every memory layer this rank's block of its table, and its sharded lookup.

    Args:
        model: built with placeholders for tables.
        config: resolved configuration.
        ranks: where this process stands.
        groups: which ranks share a copy of the tables.
        partition: a resolved ``memory.partition``.
        on_nvme: whether the optimizer state is on NVMe.
    """
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    row_adam = ROW_OPTIMIZERS.get(config.memory.table_optimizer)
    params: list[nn.Parameter] = []
    shards: list[TableShard] = []
    row_shards: list[RowSparseShard] = []
    for index, memory in enumerate(model.memory_layers):
        param = memory.values.weight
        spec = TableSpec.from_config(config.memory, index)
        layout = shard_layout(spec, partition, groups.shard.world_size, groups.shard.rank)
        values_RV = torch.empty(layout.shape, dtype=dtype, device=ranks.device)
        advise_huge_pages(values_RV)
        fill_block(
            values_RV, config, config.train.seed, index, layout.first_row, layout.first_column
        )
        install_shard(param, values_RV, layout.full_shape)
        read = shard_reader(param)
        if row_adam is None:
            shard = TableShard(spec, layout, read, groups.replicas)
        else:
            adam = row_adam(
                lambda read=read, shape=layout.shape: read().view(shape),  # type: ignore[misc]
                config.optim,
                config.memory.kernel,
            )
            shard = RowSparseShard(spec, layout, read, groups.replicas, adam)
            row_shards.append(shard)
        memory.lookup = build_lookup(shard, partition, groups, config.memory)
        params.append(param)
        shards.append(shard)
    if row_adam is None:
        make_tables = NvmeTables if on_nvme else Zero3Tables
        return make_tables(params, shards, ranks.world_size)
    names = {id(param): name for name, param in model.named_parameters()}
    return RowSparseTables(params, row_shards, [names[id(p)] for p in params], Comm())
