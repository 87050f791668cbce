"""Predicts what a run needs and moves, and chooses the partition scheme with the least time.

Pure arithmetic on a configuration: no process group, no model. Letters: B sequences per rank and
forward, T = B * S tokens, D hidden, L layers, N rows, V value width, P ranks that share one copy
of the tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ultramem_ds.config.deepspeed import load_deepspeed_json
from ultramem_ds.config.schema import Config
from ultramem_ds.planning.batches import plan_batches
from ultramem_ds.planning.costs import LookupCost, lookup_cost, stock_zero3_bytes
from ultramem_ds.planning.experts import expert_layout
from ultramem_ds.planning.memory import (
    GRADIENT_BYTES,
    MemoryPlan,
    memory_plan,
    own_optimizer_bytes,
    value_bytes,
)
from ultramem_ds.planning.rates import Rates, planned_rates
from ultramem_ds.sharding.table_plan import SCHEMES, TableSpec, padded_rows, shard_layout

ID_BYTES = 8  # row and projector ids in memory


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
        own_optimizer_bytes: of ``memory.optimizer``, what offload does not move.
        partition: the chosen scheme, empty without memory layers.
        rates: what it was chosen by, in words; empty without memory layers.
        padding_experts: slots of one expert-parallel group without an expert, per MoE block.
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
    own_optimizer_bytes: int
    partition: str
    rates: str
    padding_experts: int
    schemes: tuple[SchemePlan, ...]
    stock_zero3_bytes_per_step: float
    replica_bytes_per_optimizer_step: float

    def to_json(self) -> dict[str, Any]:
        """Plain values, ``memory.total`` included."""
        values = asdict(self)
        values["memory"] = self.memory.parts()
        return values


def resolve_partition(config: Config, world_size: int, rates: Rates | None = None) -> str:
    """``memory.partition`` with auto resolved: the possible scheme with the least predicted time.

    Args:
        config: one with memory layers.
        world_size: all ranks.
        rates: what decides auto; None is as configured or assumed.

    Raises:
        ValueError: the sub-groups do not divide the ranks, or the scheme asked for cannot be used.
    """
    ranks = _shard_ranks(config, world_size)
    if config.memory.partition != "auto":
        shard_layout(TableSpec.from_config(config.memory, 0), config.memory.partition, ranks, 0)
        return config.memory.partition
    micro = config.train.micro_batch_size
    plans = scheme_plans(config, ranks, 1 if micro == "auto" else micro, rates)
    possible = [plan for plan in plans if not plan.obstacle]
    return min(possible, key=lambda plan: plan.predicted_step_ms).scheme  # first of the fastest


def possible_schemes(config: Config, ranks: int) -> list[str]:
    """Schemes between which ``ranks`` that share a copy of the tables can choose; one for one."""
    plans = scheme_plans(config, ranks, 1)
    possible = [plan.scheme for plan in plans if not plan.obstacle]
    return possible if ranks > 1 else possible[:1]


def make_plan(
    config: Config, world_size: int, deepspeed_json: Mapping[str, Any] | None = None
) -> Plan:
    """Predicts memory, bytes and time of ``config`` on ``world_size`` ranks.

    ``train.micro_batch_size=auto`` counts as 1: what fits is a property of the other machine.
    ``deepspeed_json`` is by default the preset's own.

    Raises:
        ValueError: batch, experts, sub-groups or scheme do not fit the ranks.
    """
    if config.train.micro_batch_size == "auto":
        config = replace(config, train=replace(config.train, micro_batch_size=1))
    batches = plan_batches(config, world_size)
    if deepspeed_json is None:
        deepspeed_json = load_deepspeed_json(None, config.model.kind)
    zero = deepspeed_json.get("zero_optimization", {})
    ranks, partition, rates, stock, replica_bytes = 1, "", "", 0.0, 0.0
    schemes: tuple[SchemePlan, ...] = ()
    if config.has_memory:
        ranks = _shard_ranks(config, world_size)
        partition = resolve_partition(config, world_size)
        rates = str(planned_rates(config.memory))
        schemes = scheme_plans(config, ranks, batches.micro_batch_size)
        num_layers = len(config.memory.spans)
        stock = num_layers * stock_zero3_bytes(config.memory, ranks, value_bytes(config))
        copies = world_size // ranks
        block = num_layers * padded_rows(config.memory.num_rows, ranks) * config.memory.value_dim
        replica_bytes = 2 * (copies - 1) / copies * GRADIENT_BYTES * block / ranks
    lookups = sum(s.lookup_activation_bytes for s in schemes if s.scheme == partition)
    is_moe = config.model.kind == "moe"
    return Plan(
        preset=config.preset,
        world_size=world_size,
        shard_group_size=ranks,
        micro_batch_size=batches.micro_batch_size,
        accumulation_steps=batches.accumulation_steps,
        zero_stage=zero.get("stage", 0),
        memory=memory_plan(config, world_size, ranks, zero, batches, lookups),
        own_optimizer_bytes=own_optimizer_bytes(config, ranks),
        partition=partition,
        rates=rates,
        padding_experts=expert_layout(config, world_size).padding if is_moe else 0,
        schemes=schemes,
        stock_zero3_bytes_per_step=stock,
        replica_bytes_per_optimizer_step=replica_bytes,
    )


def scheme_plans(
    config: Config, ranks: int, micro_batch_size: int, rates: Rates | None = None
) -> tuple[SchemePlan, ...]:
    """Every scheme's cost per micro-batch, for ``ranks`` sharing one copy of the tables."""
    rates = rates or planned_rates(config.memory)
    return tuple(_scheme_plan(config, scheme, ranks, micro_batch_size, rates) for scheme in SCHEMES)


def _scheme_plan(
    config: Config, scheme: str, ranks: int, micro_batch_size: int, rates: Rates
) -> SchemePlan:
    memory, num_layers = config.memory, len(config.memory.spans)
    tokens = micro_batch_size * config.model.seq_len
    stored = value_bytes(config)
    obstacle = ""
    try:
        shard_layout(TableSpec.from_config(memory, 0), scheme, ranks, 0)
        cost = lookup_cost(memory, scheme, tokens=tokens, ranks=ranks, value_bytes=stored)
    except ValueError as error:
        obstacle = str(error)
        cost = LookupCost(forward={}, backward={}, touched_bytes=0)
    categories = {
        name: num_layers * (cost.forward.get(name, 0.0) + cost.backward.get(name, 0.0))
        for name in cost.forward
    }
    entries = tokens * memory.rows_per_token
    seconds = num_layers * cost.predicted_s(rates.wire_gb_per_s, rates.memory_gb_per_s)
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
    return entries * (entry + memory.value_dim * value_bytes(config))


def _shard_ranks(config: Config, world_size: int) -> int:
    ranks = config.memory.shard_group_size or world_size
    if world_size % ranks:
        raise ValueError(
            f"memory.shard_group_size={ranks} must divide the {world_size} data-parallel ranks"
        )
    return ranks
