"""A trained model of any world size and partition scheme, loaded for inference.

On one process it is the whole model; over the ranks of a group every rank holds its blocks of the
value tables and its experts, and all of the rest. Weights are copied block by block from mapped
files into parameters of the wanted dtype: nothing is allocated in another.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import nn

from ultramem_ds.checkpoint.parameters import parameter_records
from ultramem_ds.config.schema import Architecture
from ultramem_ds.infer.source import Source, naming_others, open_source
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.planning.planner import resolve_partition
from ultramem_ds.sharding.blocks import Block
from ultramem_ds.sharding.comm import Comm
from ultramem_ds.sharding.experts import ShardedExperts
from ultramem_ds.sharding.groups import TableGroups, make_groups
from ultramem_ds.sharding.lookup import build_lookup
from ultramem_ds.sharding.shard import TableShard
from ultramem_ds.sharding.table_plan import TableSpec, shard_layout

# Name -> the rows and columns of that parameter which this process holds; absent = all.
Held = dict[str, Block]


def load_model(
    path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """Load a run's latest checkpoint, one checkpoint, or an exported directory.

    Args:
        path: see ``infer/source``.
        device: where the model goes.
        dtype: of its weights.

    Returns:
        The model in evaluation mode, on one process.

    Raises:
        ValueError: if it is incomplete, damaged or does not fit its own configuration.
    """
    return load_whole(open_source(path), device, dtype)


def load_whole(source: Source, device: torch.device | str, dtype: torch.dtype) -> LanguageModel:
    """Load a model on one process; see :func:`load_model`."""
    with torch.device("meta"):
        model = LanguageModel(source.config)
    model.to(dtype).to_empty(device=device)
    _fill(model, {}, source)
    return model.eval()


def load_sharded(
    source: Source, comm: Comm, device: torch.device, dtype: torch.dtype
) -> LanguageModel:
    """Load a model over the ranks of ``comm``, all together.

    Tables are sharded as ``memory.partition`` and ``memory.shard_group_size`` say for this number
    of ranks, experts evenly; every forward is a sequence of collectives from then on.

    Raises:
        ValueError: on every rank; see :func:`load_model`, or tables cannot be cut so.
    """
    config = source.config
    with comm.raising_together(ValueError):
        partition = resolve_partition(config, comm.world_size) if config.has_memory else ""
    model, held = build_sharded_model(config, partition, comm, device, dtype)
    with comm.raising_together(ValueError):
        _fill(model, held, source)
    return model.eval()


def build_sharded_model(
    config: Architecture, partition: str, comm: Comm, device: torch.device, dtype: torch.dtype
) -> tuple[LanguageModel, Held]:
    """A model without values of which every rank of ``comm`` holds its part.

    Args:
        config: what the model is.
        partition: how tables are cut; a resolved ``memory.partition``.
        comm: all ranks; they call this together.
        device: of this rank.
        dtype: of the weights.

    Returns:
        The model, and which rows and columns of its tables are here.
    """
    make_mlp = None
    if config.model.kind == "moe":
        make_mlp = lambda _: ShardedExperts(config.model, config.moe, comm)  # noqa: E731
    held: Held = {}
    with torch.device("meta"):
        model = LanguageModel(config, make_mlp)
    if config.has_memory:
        groups = make_groups(
            config.memory.shard_group_size,
            asynchronous=config.memory.async_lookup,
            device=device,
            group=comm.group,
        )
        held = _cut_tables(model, config, groups, partition)
    model.to(dtype).to_empty(device=device)
    return model, held


def _cut_tables(
    model: LanguageModel, config: Architecture, groups: TableGroups, partition: str
) -> Held:
    """Leave this rank's block of every value table, and hand its layer the sharded lookup."""
    held: Held = {}
    names = {id(table): name for name, table in model.named_modules()}
    for index, memory in enumerate(model.memory_layers):
        spec = TableSpec.from_config(config.memory, index)
        layout = shard_layout(spec, partition, groups.shard.world_size, groups.shard.rank)
        table = memory.values
        table.weight = nn.Parameter(table.weight.new_empty(layout.shape), requires_grad=False)
        shard = TableShard(spec, layout, partial(getattr, table, "weight"), groups.replicas)
        memory.lookup = build_lookup(shard, partition, groups, config.memory)
        held[f"{names[id(table)]}.weight"] = layout.block(spec)
    return held


@torch.no_grad()
def _fill(model: LanguageModel, held: Held, source: Source) -> None:
    records = parameter_records(source.config)
    with naming_others(source.path):
        for name, param in model.named_parameters():
            block = held.get(name, records[name].block)
            # Rows may be padded beyond the table's last one: those are never asked for.
            values_RC = param.view(-1, block.num_columns)[: block.num_rows]
            source.weights.read(name, block, values_RC)
        buffers = dict(model.named_buffers())
        for name, value in source.weights.buffers().items():
            buffers[name].copy_(value)
    model.mark_stale()
