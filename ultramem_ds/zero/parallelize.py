"""From a resolved configuration to a model spread over ranks: the only place that combines them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from ultramem_ds.checkpoint.state import OptimizerState, OwnState
from ultramem_ds.config.deepspeed import kept_from_offload, offload_device, zero_stage
from ultramem_ds.config.schema import Config
from ultramem_ds.model.compiling import compile_blocks
from ultramem_ds.model.recompute import recompute_blocks
from ultramem_ds.planning.partition import decide_partition
from ultramem_ds.sharding.comm import Comm
from ultramem_ds.sharding.execution import Clock, no_clock
from ultramem_ds.sharding.groups import TableGroups, make_groups
from ultramem_ds.zero.construction import build_model, init_parameters
from ultramem_ds.zero.engine import start_engine
from ultramem_ds.zero.experts import ExpertShare
from ultramem_ds.zero.gradient_norms import GradientNorms
from ultramem_ds.zero.gradient_signal import GradientSignals
from ultramem_ds.zero.nvme import NvmeState
from ultramem_ds.zero.offload import prepare_offload
from ultramem_ds.zero.runtime import Ranks
from ultramem_ds.zero.shard_tables import shard_tables
from ultramem_ds.zero.state import Zero3State, Zero12State
from ultramem_ds.zero.tables import Zero3Tables


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
        gradient_signals: how much of the gradients is signal.
        table_comms: the groups over which tables travel; their counters say how much.
    """

    engine: Any
    tables: Zero3Tables | None
    zero: OptimizerState
    own_states: dict[str, OwnState]
    partition: str
    first_expert: int
    gradient_norms: GradientNorms
    gradient_signals: GradientSignals
    table_comms: tuple[Comm, ...]


def parallelize(
    config: Config, ranks: Ranks, engine_config: dict[str, Any], clock: Clock = no_clock
) -> ParallelModel:
    """Build, initialise and distribute the model of ``config``.

    In this order:

    1. :func:`build_model`: under ``zero.Init`` for ZeRO-3 (value tables as placeholders), whole for
       ZeRO-1/2; kind moe gets DeepSpeed's MoE layer in place of each MLP;
    2. :func:`init_parameters` from (seed, name), experts by their global index: the same values for
       any number of ranks;
    3. :func:`shard_tables`: this rank's block of each value table becomes its ZeRO-3 partition, and
       each memory layer gets its sharded lookup;
    4. :func:`compile_blocks`, if they are to be compiled, and :func:`recompute_blocks`, if
       activations are to be checkpointed;
    5. :func:`start_engine`: optimizer groups by role, then ``deepspeed.initialize``.

    ``clock`` is told when a lookup keeps its caller waiting.
    """
    prepare_offload(engine_config, ranks.rank)
    if ranks.is_main and (kept := kept_from_offload(engine_config, config)):
        print(kept, file=sys.stderr, flush=True)
    groups = _table_groups(config, ranks, clock) if config.has_memory else None
    partition = ""
    if groups is not None:
        partition = decide_partition(config, Comm(), groups, ranks.device)
    experts = ExpertShare.of(config, ranks.rank, ranks.world_size)

    model = build_model(config, engine_config, groups, experts)
    init_parameters(model, config, experts, partitioned=zero_stage(engine_config) == 3)
    tables = None
    if groups is not None:
        on_nvme = offload_device(engine_config) == "nvme"
        tables = shard_tables(model, config, ranks, groups, partition, on_nvme)
    if config.train.compile:
        compile_blocks(model)
    if config.train.activation_checkpointing:
        recompute_blocks(model)
    engine = start_engine(model, config, engine_config, tables)

    zero, own_states = _optimizer_states(engine, engine_config, tables, experts)
    in_memory = zero if isinstance(zero, Zero12State | Zero3State) else None
    return ParallelModel(
        engine=engine,
        tables=tables,
        zero=zero,
        own_states=own_states,
        partition=partition,
        first_expert=experts.first,
        gradient_norms=GradientNorms(engine, tables.joined_norm if tables is not None else None),
        gradient_signals=GradientSignals(
            engine.module, in_memory, experts.canonical_name, tables, config.optim
        ),
        table_comms=(groups.shard, groups.replicas) if groups is not None else (),
    )


def _table_groups(config: Config, ranks: Ranks, clock: Clock) -> TableGroups:
    return make_groups(
        config.memory.shard_group_size,
        asynchronous=config.memory.async_lookup,
        device=ranks.device,
        clock=clock,
    )


def _optimizer_states(
    engine: Any, engine_config: dict[str, Any], tables: Zero3Tables | None, experts: ExpertShare
) -> tuple[OptimizerState, dict[str, OwnState]]:
    """Where masters and moments are: DeepSpeed's, and those that it does not save."""
    if zero_stage(engine_config) != 3:
        return Zero12State(engine, experts.canonical_name), {}
    own: dict[str, OwnState] = {} if tables is None else tables.own_states()
    zero = Zero3State(engine, tables.blocks() if tables is not None else {})
    if offload_device(engine_config) != "nvme":
        return zero, own
    on_nvme = NvmeState(zero, engine)
    return on_nvme, {**own, **on_nvme.buffers}
