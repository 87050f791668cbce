"""What one rank holds, in bytes: pure arithmetic on a configuration.

Letters: N rows of a table, V value width, P ranks that share one copy of the tables, X experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from ultramem_ds.config.deepspeed import BatchPlan
from ultramem_ds.config.schema import Config
from ultramem_ds.model.accounting import count
from ultramem_ds.planning.batches import activation_bytes_per_sequence
from ultramem_ds.planning.costs import distinct_rows
from ultramem_ds.planning.experts import expert_layout
from ultramem_ds.sharding.table_plan import padded_rows

OPTIMIZER_BYTES = 12  # fp32 master weight and Adam's two moments, per parameter
GRADIENT_BYTES = 4  # gradients are accumulated in fp32


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


@dataclass(frozen=True)
class _Held:
    """Bytes of one kind of parameters."""

    weights: int
    gradients: int
    optimizer: int


def memory_plan(
    config: Config, world_size: int, ranks: int, stage: int, batches: BatchPlan, lookups: int
) -> MemoryPlan:
    """Bytes on one rank: tables by shard, experts by group, the rest by ZeRO stage.

    Args:
        config: what is trained.
        world_size: all ranks.
        ranks: P.
        stage: the ZeRO stage.
        batches: how a step is cut up.
        lookups: bytes that the lookups of one micro-batch keep for their backward.
    """
    sparse = _Held(0, 0, 0)
    if config.has_memory:
        sparse = _tables(config, ranks, batches)
    elif config.model.kind == "moe":
        sparse = _experts(config, world_size)
    dense = _dense(config, world_size, stage)
    per_sequence = activation_bytes_per_sequence(config)
    return MemoryPlan(
        weights=dense.weights + sparse.weights,
        gradients=dense.gradients + sparse.gradients,
        optimizer=dense.optimizer + sparse.optimizer,
        activations=batches.micro_batch_size * per_sequence + lookups,
    )


def _dense(config: Config, world_size: int, stage: int) -> _Held:
    size = count(config)
    embedding = 2 * config.model.vocab_size * config.model.hidden_size
    dense = size.dense_params + size.norm_params + embedding
    largest_gather = max(embedding // 2, dense // max(1, config.model.num_layers))
    weights = dense // world_size + largest_gather if stage == 3 else dense
    gradients = dense // world_size if stage >= 2 else dense
    return _Held(
        value_bytes(config) * weights,
        GRADIENT_BYTES * gradients,
        OPTIMIZER_BYTES * (dense // world_size),
    )


def _experts(config: Config, world_size: int) -> _Held:
    """Padding takes what an expert takes."""
    layout = expert_layout(config, world_size)
    per_expert = count(config).sparse_params // config.moe.num_experts
    here = per_expert * layout.slots_per_rank
    # Experts are data-parallel over the groups that hold the same ones.
    copies = world_size // layout.group_size
    return _Held(
        value_bytes(config) * here, GRADIENT_BYTES * here, OPTIMIZER_BYTES * here // copies
    )


def _tables(config: Config, ranks: int, batches: BatchPlan) -> _Held:
    memory = config.memory
    rows = padded_rows(memory.num_rows, ranks)
    here = len(memory.spans) * rows * memory.value_dim // ranks
    if memory.table_optimizer == "dense":
        gradients = 2 * GRADIENT_BYTES * here  # where lookups add, and ZeRO's own
    else:
        gradients = len(memory.spans) * _row_gradients(config, ranks, batches)
    return _Held(value_bytes(config) * here, gradients, OPTIMIZER_BYTES * here)


def _row_gradients(config: Config, ranks: int, batches: BatchPlan) -> int:
    """Gradients of the rows that one table's lookups of a step touch, for uniform ids.

    The sum over micro-batches has room for up to twice as many rows as it holds, never for more
    than the shard has; the last micro-batch's own are beside it, with a copy of their values.
    """
    memory = config.memory
    entries = batches.micro_batch_size * config.model.seq_len * memory.rows_per_token * ranks
    once = distinct_rows(entries, memory.num_rows)
    held = once
    if batches.accumulation_steps > 1:
        held = distinct_rows(entries * batches.accumulation_steps, memory.num_rows)
        held = min(2 * held, memory.num_rows)
    row = memory.value_dim * (GRADIENT_BYTES * (held + once) + value_bytes(config) * once)
    return int(row / ranks)


def value_bytes(config: Config) -> int:
    """Bytes of one stored weight."""
    return 2 if config.train.precision == "bf16" else 4
