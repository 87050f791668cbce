"""What one rank holds, in bytes: pure arithmetic on a configuration.

Letters: N rows of a table, V value width, P ranks that share one copy of the tables, X experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ultramem_ds.config.deepspeed import BatchPlan
from ultramem_ds.config.schema import Config
from ultramem_ds.model.accounting import count
from ultramem_ds.planning.batches import activation_bytes
from ultramem_ds.planning.costs import distinct_rows
from ultramem_ds.planning.experts import expert_layout
from ultramem_ds.sharding.table_plan import padded_rows

GRADIENT_BYTES = 4  # gradients are accumulated in fp32
MOMENT_BYTES = 8  # Adam's two, fp32
MASTER_BYTES = 4  # fp32 weights beside those that compute
# ZeRO-3 keeps a gathered parameter that is used again before so many others: DeepSpeed's default.
REUSE_DISTANCE = 1_000_000_000
# Python, PyTorch, DeepSpeed and what a first step loads, resident; benchmarks/start_memory.py.
PROCESS_BYTES = 310_000_000
# glibc keeps freed blocks of up to 32 MB in its heap, where the next step's do not fit exactly: of
# a micro-batch's activations this share, measured on small models; larger blocks go back at once.
KEPT_SHARE = 0.75
MOST_KEPT_BYTES = 128_000_000


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on one rank at the fullest moment of a step."""

    weights: int  # with what ZeRO-3 keeps gathered
    gradients: int
    optimizer: int
    activations: int  # of one micro-batch, the lookups' buffers under the chosen scheme included
    buffers: int  # reduction buckets; and copies of gradients that a step makes, if they take more
    # than the activations, which are gone by then
    process: int  # the program itself and what its allocator keeps, on CPUs

    @property
    def total(self) -> int:
        """Everything that is counted."""
        return sum(asdict(self).values())

    def parts(self) -> dict[str, int]:
        """Every field by name, ``total`` last."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class _Held:
    """Bytes of one kind of parameters."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    buffers: int = 0
    copies: int = 0  # of gradients, while the optimizer steps


def memory_plan(
    config: Config,
    world_size: int,
    ranks: int,
    zero: Mapping[str, Any],
    batches: BatchPlan,
    lookups: int,
) -> MemoryPlan:
    """Bytes on one rank: tables by shard, experts by group, the rest by ZeRO stage.

    Args:
        config: what is trained.
        world_size: all ranks.
        ranks: P.
        zero: ``zero_optimization`` of the DeepSpeed configuration.
        batches: how a step is cut up.
        lookups: bytes that the lookups of one micro-batch keep for their backward.
    """
    sparse = _Held()
    if config.has_memory:
        sparse = _tables(config, ranks, zero, batches)
    elif config.model.kind == "moe":
        sparse = _experts(config, world_size)
    dense = _dense(config, world_size, zero)
    activations = activation_bytes(config, batches.micro_batch_size) + lookups
    copies = dense.copies + sparse.copies
    return MemoryPlan(
        weights=dense.weights + sparse.weights,
        gradients=dense.gradients + sparse.gradients,
        optimizer=dense.optimizer + sparse.optimizer,
        activations=activations,
        buffers=dense.buffers + sparse.buffers + max(0, copies - activations),
        process=PROCESS_BYTES + min(int(KEPT_SHARE * activations), MOST_KEPT_BYTES),
    )


def _dense(config: Config, world_size: int, zero: Mapping[str, Any]) -> _Held:
    """Attention, MLPs, norms, embedding and head."""
    size, width, stage = count(config), value_bytes(config), zero.get("stage", 0)
    embedding = 2 * config.model.vocab_size * config.model.hidden_size
    dense = size.dense_params + size.norm_params + embedding
    mine = dense // world_size
    bucket = min(dense, int(zero.get("reduce_bucket_size", 5e8))) * width
    optimizer = (MOMENT_BYTES + _master_bytes(config, zero)) * mine
    if stage == 3:
        gathered = min(dense, REUSE_DISTANCE)
        copied = min(mine, _sub_group_size(zero) + embedding // 2 // world_size)
        return _Held(
            width * (mine + gathered),
            GRADIENT_BYTES * mine,
            optimizer,
            bucket,
            GRADIENT_BYTES * copied,
        )
    if stage == 2:
        bucket *= 2 if zero.get("overlap_comm") else 1
        gradients = GRADIENT_BYTES * mine
        return _Held(width * dense, gradients, optimizer, bucket, gradients)
    # bf16: a backward's own gradients and their fp32 copies beside the sums. fp32: the step's copy
    # of this rank's.
    held = _Held(width * dense, GRADIENT_BYTES * dense, optimizer)
    if width == 2:
        return replace(held, buffers=(width + GRADIENT_BYTES) * dense)
    return replace(held, copies=GRADIENT_BYTES * mine)


def _experts(config: Config, world_size: int) -> _Held:
    """Padding takes what an expert takes."""
    layout = expert_layout(config, world_size)
    per_expert = count(config).sparse_params // config.moe.num_experts
    here = per_expert * layout.slots_per_rank
    # Experts are data-parallel over the groups that hold the same ones.
    mine = here // (world_size // layout.group_size)
    return _Held(
        value_bytes(config) * here,
        GRADIENT_BYTES * mine,
        (MASTER_BYTES + MOMENT_BYTES) * mine,
        copies=GRADIENT_BYTES * mine,
    )


def _sub_group_size(zero: Mapping[str, Any]) -> int:
    """Elements of this rank after which ZeRO-3's step begins another flat buffer."""
    return int(zero.get("sub_group_size", 1e9))


def _tables(config: Config, ranks: int, zero: Mapping[str, Any], batches: BatchPlan) -> _Held:
    memory, width = config.memory, value_bytes(config)
    num_tables, table = len(memory.spans), _table_elements(config, ranks)
    here = num_tables * table
    if memory.table_optimizer != "dense":
        gradients = num_tables * _row_gradients(config, ranks, batches)
        return _Held(width * here, gradients, own_optimizer_bytes(config, ranks))
    optimizer = (MOMENT_BYTES + _master_bytes(config, zero)) * here
    # Lookups add where ZeRO keeps them; under offload that is elsewhere. Its step lays those of a
    # sub-group side by side.
    gradients = GRADIENT_BYTES * here * (2 if _is_offloaded(zero) else 1)
    side_by_side = min(num_tables, -(-_sub_group_size(zero) // table))
    copied = side_by_side * table if side_by_side > 1 else 0
    return _Held(width * here, gradients, optimizer, copies=GRADIENT_BYTES * copied)


def own_optimizer_bytes(config: Config, ranks: int) -> int:
    """Masters and moments that DeepSpeed does not hold: of tables that are stepped by row.

    They lie beside the tables, whatever is offloaded; fp32 tables are their own masters.
    """
    if not config.has_memory or config.memory.table_optimizer == "dense":
        return 0
    master = 0 if value_bytes(config) == 4 else MASTER_BYTES
    return (MOMENT_BYTES + master) * len(config.memory.spans) * _table_elements(config, ranks)


def _table_elements(config: Config, ranks: int) -> int:
    """Of one table on one rank."""
    memory = config.memory
    return padded_rows(memory.num_rows, ranks) * memory.value_dim // ranks


def _master_bytes(config: Config, zero: Mapping[str, Any]) -> int:
    """Of a parameter's fp32 weight beside the one that computes; under ZeRO-3 fp32 has no other."""
    alone = value_bytes(config) == 4 and zero.get("stage", 0) == 3 and not _is_offloaded(zero)
    return 0 if alone else MASTER_BYTES


def _is_offloaded(zero: Mapping[str, Any]) -> bool:
    return bool(zero.get("offload_optimizer", {}).get("device", "none") != "none")


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
