"""What one lookup of each partition scheme costs, in bytes on the wire and in memory traffic.

The formulas of paper App. D, with expansion and cores charged, for uniform random row ids.
Measured bytes (``Comm.bytes_sent``) agree within 2% (tests/dist/test_sharding_bytes.py).

Letters: T tokens per rank, K rows per token, N rows, V value width, E expansion, h cores, P ranks
that share one copy of the table.
"""

from __future__ import annotations

from dataclasses import dataclass

from ultramem_ds.config.schema import MemoryConfig
from ultramem_ds.sharding.table_plan import SCHEMES, id_dtype

WIRE_BYTES = {"fp32": 4, "bf16": 2}
COUNT_BYTES = 8
MIN_FRAGMENT_BYTES = 64  # a cache line: what reading one byte of a row costs


@dataclass(frozen=True, kw_only=True)
class LookupCost:
    """Bytes one rank moves for one lookup of one memory layer.

    Attributes:
        forward: bytes sent to other ranks, by category of ``Comm.bytes_sent``.
        backward: the same for the gradients.
        touched_bytes: bytes of table rows that the rank reads in the forward, each fragment at
            least a cache line; the backward touches as many again.
    """

    forward: dict[str, float]
    backward: dict[str, float]
    touched_bytes: float

    @property
    def wire_bytes(self) -> float:
        """Forward and backward bytes sent."""
        return sum(self.forward.values()) + sum(self.backward.values())

    def predicted_s(self, wire_gb_per_s: float, memory_gb_per_s: float) -> float:
        """Seconds of one forward and backward: wire time plus memory time."""
        wire_s = self.wire_bytes / (wire_gb_per_s * 1e9)
        return wire_s + 2 * self.touched_bytes / (memory_gb_per_s * 1e9)


def lookup_cost(
    memory: MemoryConfig, scheme: str, *, tokens: int, ranks: int, value_bytes: int
) -> LookupCost:
    """Cost of looking up ``tokens`` tokens per rank under ``scheme``.

    Args:
        memory: sizes, wire dtype, de-duplication.
        scheme: a resolved ``memory.partition``.
        tokens: T, per rank.
        ranks: P.
        value_bytes: bytes of one stored value.

    Raises:
        ValueError: an unknown scheme.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"memory.partition={scheme!r} is none of {', '.join(SCHEMES)}")
    entries = tokens * memory.rows_per_token
    cost = {
        "number-wise": _number_wise,
        "owner-pooled": _owner_pooled,
        "dimension-wise": _dimension_wise,
    }[scheme]
    return cost(memory, tokens, entries, ranks, value_bytes)


def bags_per_token_and_owner(memory: MemoryConfig, ranks: int) -> float:
    """Expected (token, projector) sums of one owner: E (1 - (1 - 1/(P E))^K)."""
    E = memory.expansion
    return E * (1 - (1 - 1 / (ranks * E)) ** memory.rows_per_token)


def distinct_rows(entries: int, num_rows: int) -> float:
    """Expected distinct rows among uniform draws: N (1 - (1 - 1/N)^entries)."""
    return float(num_rows * (1 - (1 - 1 / num_rows) ** entries))


def stock_zero3_bytes(memory: MemoryConfig, ranks: int, value_bytes: int) -> float:
    """Bytes per rank if ZeRO-3 gathered one table (twice) and reduced its gradient."""
    table = memory.num_rows * memory.value_dim * value_bytes
    return 3 * table * (ranks - 1) / ranks


def _number_wise(
    memory: MemoryConfig, tokens: int, entries: int, ranks: int, value_bytes: int
) -> LookupCost:
    wire = WIRE_BYTES.get(memory.wire_dtype, value_bytes)
    sent = distinct_rows(entries, memory.num_rows) if memory.dedup else entries
    remote = sent * (ranks - 1) / ranks
    rows = wire * memory.value_dim * remote
    ids = id_dtype(memory.num_rows // ranks).itemsize * remote
    return LookupCost(
        forward={"counts": 2 * COUNT_BYTES * (ranks - 1), "ids": ids, "rows": rows},
        backward={"rows": rows},
        touched_bytes=sent * max(memory.value_dim * value_bytes, MIN_FRAGMENT_BYTES),
    )


def _owner_pooled(
    memory: MemoryConfig, tokens: int, entries: int, ranks: int, value_bytes: int
) -> LookupCost:
    wire = WIRE_BYTES.get(memory.wire_dtype, value_bytes)
    remote = entries * (ranks - 1) / ranks
    scores = wire * memory.num_cores * remote
    bags = tokens * bags_per_token_and_owner(memory, ranks) * (ranks - 1)
    pooled = wire * memory.value_dim * bags
    ids = id_dtype(memory.num_rows // ranks).itemsize * remote
    return LookupCost(
        forward={
            "counts": 3 * COUNT_BYTES * (ranks - 1),
            "ids": ids,
            "scores": scores,
            "pooled": pooled,
        },
        backward={"pooled": pooled, "scores": scores},
        touched_bytes=entries * max(memory.value_dim * value_bytes, MIN_FRAGMENT_BYTES),
    )


def _dimension_wise(
    memory: MemoryConfig, tokens: int, entries: int, ranks: int, value_bytes: int
) -> LookupCost:
    wire = WIRE_BYTES.get(memory.wire_dtype, value_bytes)
    scores = wire * memory.num_cores * entries * (ranks - 1)
    pooled = wire * memory.expansion * memory.value_dim * tokens * (ranks - 1) / ranks
    fragment = memory.value_dim / ranks * value_bytes
    return LookupCost(
        forward={
            "counts": 2 * COUNT_BYTES * (ranks - 1),
            "ids": id_dtype(memory.num_slots).itemsize * entries * (ranks - 1),
            "scores": scores,
            "pooled": pooled,
        },
        backward={"pooled": pooled, "scores": scores},
        touched_bytes=ranks * entries * max(fragment, MIN_FRAGMENT_BYTES),
    )
