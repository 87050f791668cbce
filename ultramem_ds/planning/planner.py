"""Predicts what a run needs and moves, and chooses the partition scheme with the least time.

Pure arithmetic on a configuration: no process group, no model. Letters: B sequences per rank and
forward, T = B * S tokens, D hidden, L layers, N rows, V value width, P ranks that share one copy
of the tables.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from ultramem_ds.config.deepspeed import default_file, load_deepspeed_json, zero_stage
from ultramem_ds.config.schema import Config
from ultramem_ds.model.accounting import count
from ultramem_ds.planning.batches import activation_bytes_per_sequence, plan_batches
from ultramem_ds.planning.costs import LookupCost, lookup_cost, stock_zero3_bytes
from ultramem_ds.planning.experts import expert_parallel_size
from ultramem_ds.sharding.table_plan import SCHEMES, TableSpec, padded_rows, shard_layout

OPTIMIZER_BYTES = 12  # fp32 master weight and Adam's two moments, per parameter
GRADIENT_BYTES = 4  # gradients are accumulated in fp32
ID_BYTES = 8  # row and projector ids in memory


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on one rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # of one micro-batch, the lookups' buffers under the chosen scheme included

    @property
    def total(self) -> int:
        """Everything that is counted."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True, kw_only=True)
class SchemePlan:
    """What one scheme costs one rank; a step is one forward and backward of a micro-batch.

    ``obstacle`` says why the scheme cannot be used here, empty if it can; the costs are then zero.
    """

    scheme: str
    obstacle: str
    forward_bytes_per_layer: float
    backward_bytes_per_layer: float
    bytes_per_step: float  # all memory layers
    bytes_by_category: dict[str, float]  # forward and backward, all memory layers
    lookup_activation_bytes: int  # kept from forward to backward, all memory layers
    predicted_step_ms: float  # of the lookups, nothing overlapped


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A configuration on a number of ranks.

    Attributes:
        preset: its name.
        world_size: all ranks.
        shard_group_size: ranks that share one copy of the tables, P.
        micro_batch_size: sequences per rank and forward.
        accumulation_steps: forwards per optimizer step.
        zero_stage: the ZeRO stage.
        memory: bytes on one rank under the chosen scheme.
        partition: the chosen scheme, empty without memory layers.
        schemes: all schemes, empty without memory layers.
        stock_zero3_bytes_per_step: if ZeRO-3 gathered the tables as any other parameter.
        replica_bytes_per_optimizer_step: tables' gradients between sub-groups.
    """

    preset: str
    world_size: int
    shard_group_size: int
    micro_batch_size: int
    accumulation_steps: int
    zero_stage: int
    memory: MemoryPlan
    partition: str
    schemes: tuple[SchemePlan, ...]
    stock_zero3_bytes_per_step: float
    replica_bytes_per_optimizer_step: float

    def to_json(self) -> dict[str, Any]:
        """Plain values, ``memory.total`` included."""
        values = asdict(self)
        values["memory"]["total"] = self.memory.total
        return values


def resolve_partition(config: Config, world_size: int) -> str:
    """``memory.partition`` with auto resolved: the possible scheme with the least predicted time.

    Args:
        config: one with memory layers.
        world_size: all ranks.

    Raises:
        ValueError: the sub-groups do not divide the ranks, or the scheme asked for cannot be used.
    """
    ranks = _shard_ranks(config, world_size)
    if config.memory.partition != "auto":
        shard_layout(TableSpec.from_config(config.memory, 0), config.memory.partition, ranks, 0)
        return config.memory.partition
    micro = config.train.micro_batch_size
    return _choose(scheme_plans(config, ranks, 1 if micro == "auto" else micro))


def make_plan(config: Config, world_size: int, stage: int | None = None) -> Plan:
    """Predicts memory, bytes and time of ``config`` on ``world_size`` ranks.

    ``train.micro_batch_size=auto`` counts as 1: what fits is a property of the other machine.
    ``stage`` is the ZeRO stage, by default that of the preset's own DeepSpeed configuration.

    Raises:
        ValueError: batch, experts, sub-groups or scheme do not fit the ranks.
    """
    if config.train.micro_batch_size == "auto":
        config = replace(config, train=replace(config.train, micro_batch_size=1))
    batches = plan_batches(config, world_size)
    if stage is None:
        stage = zero_stage(load_deepspeed_json(default_file(config.model.kind), config.model.kind))
    ranks, partition, stock, replica_bytes = 1, "", 0.0, 0.0
    schemes: tuple[SchemePlan, ...] = ()
    if config.has_memory:
        ranks = _shard_ranks(config, world_size)
        partition = resolve_partition(config, world_size)
        schemes = scheme_plans(config, ranks, batches.micro_batch_size)
        num_layers = len(config.memory.spans)
        stock = num_layers * stock_zero3_bytes(config.memory, ranks, _value_bytes(config))
        copies = world_size // ranks
        block = num_layers * padded_rows(config.memory.num_rows, ranks) * config.memory.value_dim
        replica_bytes = 2 * (copies - 1) / copies * GRADIENT_BYTES * block / ranks
    lookups = sum(s.lookup_activation_bytes for s in schemes if s.scheme == partition)
    return Plan(
        preset=config.preset,
        world_size=world_size,
        shard_group_size=ranks,
        micro_batch_size=batches.micro_batch_size,
        accumulation_steps=batches.accumulation_steps,
        zero_stage=stage,
        memory=_memory_plan(config, world_size, ranks, stage, batches.micro_batch_size, lookups),
        partition=partition,
        schemes=schemes,
        stock_zero3_bytes_per_step=stock,
        replica_bytes_per_optimizer_step=replica_bytes,
    )


def scheme_plans(config: Config, ranks: int, micro_batch_size: int) -> tuple[SchemePlan, ...]:
    """Every scheme's cost per micro-batch, for ``ranks`` sharing one copy of the tables."""
    return tuple(_scheme_plan(config, scheme, ranks, micro_batch_size) for scheme in SCHEMES)


def _scheme_plan(config: Config, scheme: str, ranks: int, micro_batch_size: int) -> SchemePlan:
    memory, num_layers = config.memory, len(config.memory.spans)
    tokens = micro_batch_size * config.model.seq_len
    value_bytes = _value_bytes(config)
    obstacle = ""
    try:
        shard_layout(TableSpec.from_config(memory, 0), scheme, ranks, 0)
        cost = lookup_cost(memory, scheme, tokens=tokens, ranks=ranks, value_bytes=value_bytes)
    except ValueError as error:
        obstacle = str(error)
        cost = LookupCost(forward={}, backward={}, touched_bytes=0)
    categories = {
        name: num_layers * (cost.forward.get(name, 0.0) + cost.backward.get(name, 0.0))
        for name in cost.forward
    }
    entries = tokens * memory.rows_per_token
    seconds = num_layers * cost.predicted_s(memory.wire_gb_per_s, memory.memory_gb_per_s)
    return SchemePlan(
        scheme=scheme,
        obstacle=obstacle,
        forward_bytes_per_layer=sum(cost.forward.values()),
        backward_bytes_per_layer=sum(cost.backward.values()),
        bytes_per_step=num_layers * cost.wire_bytes,
        bytes_by_category=categories,
        lookup_activation_bytes=num_layers * _kept_bytes(config, scheme, entries, ranks),
        predicted_step_ms=1e3 * seconds,
    )


def _choose(schemes: tuple[SchemePlan, ...]) -> str:
    """The first of the fastest."""
    possible = [plan for plan in schemes if not plan.obstacle]
    return min(possible, key=lambda plan: plan.predicted_step_ms).scheme


def _kept_bytes(config: Config, scheme: str, entries: int, ranks: int) -> int:
    """What one layer's lookup keeps for its backward, beside the selection itself."""
    memory = config.memory
    entry = 2 * ID_BYTES + 4 * memory.num_cores
    if ranks == 1:
        return 0
    if scheme == "dimension-wise":
        return ranks * entries * entry
    if scheme == "owner-pooled":
        return entries * entry
    # The received rows, for the scores' gradient.
    return entries * (entry + memory.value_dim * _value_bytes(config))


def _memory_plan(
    config: Config, world_size: int, ranks: int, stage: int, micro_batch_size: int, lookups: int
) -> MemoryPlan:
    """Bytes on one rank: tables by shard, the rest by ZeRO stage."""
    size, value_bytes = count(config), _value_bytes(config)
    embedding = 2 * config.model.vocab_size * config.model.hidden_size
    dense = size.dense_params + size.norm_params + embedding
    sparse_here = size.sparse_params
    if config.has_memory:
        memory = config.memory
        rows = padded_rows(memory.num_rows, ranks)
        sparse_here = len(memory.spans) * rows * memory.value_dim // ranks
    elif config.model.kind == "moe":
        sparse_here = size.sparse_params // expert_parallel_size(config, world_size)
    # Experts are data-parallel over the groups that hold the same ones.
    expert_copies = max(1, world_size * sparse_here // max(1, size.sparse_params))
    sparse_optimizer = sparse_here if config.has_memory else sparse_here // expert_copies
    largest_gather = max(embedding // 2, dense // max(1, config.model.num_layers))
    weights = dense // world_size + largest_gather if stage == 3 else dense
    gradients = dense // world_size if stage >= 2 else dense
    # A table's: where lookups add, and ZeRO's own; touched rows only for a row-sparse optimizer.
    table_buffers = 2 if config.memory.table_optimizer == "dense" else 0
    gradients += sparse_here * (table_buffers if config.has_memory else 1)
    return MemoryPlan(
        weights=value_bytes * (weights + sparse_here),
        gradients=GRADIENT_BYTES * gradients,
        optimizer=OPTIMIZER_BYTES * (dense // world_size + sparse_optimizer),
        activations=micro_batch_size * activation_bytes_per_sequence(config) + lookups,
    )


def _shard_ranks(config: Config, world_size: int) -> int:
    ranks = config.memory.shard_group_size or world_size
    if world_size % ranks:
        raise ValueError(
            f"memory.shard_group_size={ranks} must divide the {world_size} data-parallel ranks"
        )
    return ranks


def _value_bytes(config: Config) -> int:
    return 2 if config.train.precision == "bf16" else 4
