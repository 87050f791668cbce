"""From a resolved configuration to a model spread over ranks: the only place that combines them."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ultramem_ds.checkpoint.state import OptimizerState, OwnState
from ultramem_ds.config.deepspeed import offload_device, zero_stage
from ultramem_ds.config.schema import Config
from ultramem_ds.kernels.hugepages import advise_huge_pages
from ultramem_ds.model.init import fill_block, init_parameter
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.optim.param_groups import build_param_groups
from ultramem_ds.optim.row_adam import ROW_OPTIMIZERS
from ultramem_ds.planning.experts import expert_parallel_size
from ultramem_ds.planning.planner import resolve_partition
from ultramem_ds.sharding.comm import Comm
from ultramem_ds.sharding.execution import Clock, no_clock
from ultramem_ds.sharding.groups import TableGroups, make_groups
from ultramem_ds.sharding.lookup import build_lookup
from ultramem_ds.sharding.shard import TableShard
from ultramem_ds.sharding.table_plan import TableSpec, shard_layout
from ultramem_ds.zero import tables as zero3
from ultramem_ds.zero.deepspeed_import import deepspeed
from ultramem_ds.zero.experts import ExpertParallelMLP, canonical_name
from ultramem_ds.zero.gradient_norms import GradientNorms
from ultramem_ds.zero.nvme import NvmeState, NvmeTables
from ultramem_ds.zero.offload import prepare_offload
from ultramem_ds.zero.row_sparse import RowSparseShard, RowSparseTables
from ultramem_ds.zero.runtime import Ranks
from ultramem_ds.zero.state import Zero3State, Zero12State


@dataclass(frozen=True)
class ParallelModel:
    """What :func:`parallelize` returns.

    Attributes:
        engine: the DeepSpeed engine; ``engine.module`` is the :class:`LanguageModel`.
        tables: the value tables on this rank; None without memory layers.
        zero: where DeepSpeed keeps masters and moments.
        own_states: optimizer state that DeepSpeed knows nothing of, by name of its files.
        partition: the scheme in use, empty without memory layers.
        first_expert: global index of this rank's first expert (kind moe), else 0.
        gradient_norms: parts of the global norm.
        table_comms: the groups over which tables travel; their counters say how much.
    """

    engine: Any
    tables: zero3.Zero3Tables | None
    zero: OptimizerState
    own_states: dict[str, OwnState]
    partition: str
    first_expert: int
    gradient_norms: GradientNorms
    table_comms: tuple[Comm, ...]


def parallelize(
    config: Config, ranks: Ranks, engine_config: dict[str, Any], clock: Clock = no_clock
) -> ParallelModel:
    """Build, initialise and distribute the model of ``config``.

    In this order:

    1. build the model: under ``zero.Init`` for ZeRO-3 (value tables as placeholders), whole for
       ZeRO-1/2; kind moe gets DeepSpeed's MoE layer in place of each MLP;
    2. initialise every parameter from (seed, name), experts by their global index: the same values
       for any number of ranks;
    3. fill this rank's block of each value table and install it as its ZeRO-3 partition;
    4. sort parameters into optimizer groups by role, split off experts for DeepSpeed;
    5. ``deepspeed.initialize``;
    6. exempt the tables from ZeRO-3's persistence and hand each memory layer its sharded lookup.

    ``clock`` is told when a lookup keeps its caller waiting.
    """
    prepare_offload(engine_config, ranks.rank)
    partitioned = zero_stage(engine_config) == 3
    first_expert = 0
    make_mlp = make_table = groups = None
    if config.model.kind == "moe":
        ep_size = expert_parallel_size(config, ranks.world_size)
        first_expert = (ranks.rank % ep_size) * (config.moe.num_experts // ep_size)
        make_mlp = lambda _: ExpertParallelMLP(config, ep_size)  # noqa: E731
    if config.has_memory:
        groups = make_groups(
            config.memory.shard_group_size,
            asynchronous=config.memory.async_lookup,
            device=ranks.device,
            clock=clock,
        )
        make_table = lambda i: zero3.TablePlaceholder(groups.shard, i)  # noqa: E731
    construction = (
        zero3.partitioned_construction(engine_config) if partitioned else contextlib.nullcontext()
    )
    with construction, contextlib.redirect_stdout(sys.stderr):
        model = LanguageModel(config, make_mlp, make_table)
    named = [
        (canonical_name(name, first_expert), param)
        for name, param in model.named_parameters()
        if getattr(param, "role", None) != "table"
    ]

    def fill(name: str, param: nn.Parameter) -> None:
        init_parameter(name, param, config, config.train.seed)

    if partitioned:
        zero3.fill_partitioned(named, fill)
    else:
        for name, param in named:
            fill(name, param)
    on_nvme = offload_device(engine_config) == "nvme"
    partition, tables = "", None
    if groups is not None:
        partition = resolve_partition(config, ranks.world_size)
        tables = _install_tables(model, config, ranks, groups, partition, on_nvme)
    engine = _initialize(model, config, engine_config)
    if tables is not None:
        tables.keep_partitioned(engine)
    own_states: dict[str, OwnState] = {}
    zero: OptimizerState
    if partitioned:
        zero = Zero3State(engine, tables.blocks() if tables is not None else {})
        if on_nvme:
            zero = NvmeState(zero, engine)
            own_states.update(zero.buffers)
    else:
        zero = Zero12State(engine, lambda name: canonical_name(name, first_expert))
    if isinstance(tables, RowSparseTables):
        own_states["tables"] = tables
    return ParallelModel(
        engine,
        tables,
        zero,
        own_states,
        partition,
        first_expert,
        GradientNorms(engine),
        (groups.shard, groups.replicas) if groups is not None else (),
    )


def _install_tables(
    model: LanguageModel,
    config: Config,
    ranks: Ranks,
    groups: TableGroups,
    partition: str,
    on_nvme: bool,
) -> zero3.Zero3Tables:
    """Give every memory layer its block of the table and its lookup."""
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
        zero3.install_shard(param, values_RV, layout.full_shape)
        read = zero3.shard_reader(param)
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
        make_tables = NvmeTables if on_nvme else zero3.Zero3Tables
        return make_tables(params, shards, ranks.world_size)
    names = {id(param): name for name, param in model.named_parameters()}
    return RowSparseTables(params, row_shards, [names[id(p)] for p in params], Comm())


def _initialize(model: LanguageModel, config: Config, engine_config: dict[str, Any]) -> Any:
    groups: list[Any] = list(build_param_groups(model.named_parameters(), config.optim))
    if config.model.kind == "moe":
        groups = deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer(groups)
        groups = [group for group in groups if group["params"]]
    with contextlib.redirect_stdout(sys.stderr):
        engine, _, _, _ = deepspeed.initialize(
            model=model,
            optimizer=make_optimizer(groups, config, engine_config),
            config=engine_config,
            dist_init_required=False,
        )
    return engine


def make_optimizer(
    groups: list[Any], config: Config, engine_config: dict[str, Any]
) -> torch.optim.Optimizer:
    """AdamW over role groups: DeepSpeed's CPU kernel under offload, torch's otherwise."""
    optim = config.optim
    settings: dict[str, Any] = dict(lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    offload = engine_config.get("zero_optimization", {}).get("offload_optimizer", {})
    if offload.get("device", "none") != "none":
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    return torch.optim.AdamW(groups, fused=torch.cuda.is_available(), **settings)
