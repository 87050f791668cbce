"""Bytes and operations of the lookup's programs, from their shapes.

Letters: T tokens, K entries per token, M = T * K, R rows of the table, U distinct ones among M
uniform draws, V value width, h cores, E projectors, B = T * E bags. A table element has ``size``
bytes, sums and scores four, ids eight. Each byte counts once: what two programs on the device read
twice out of its cache is free here, so that a program cannot be faster than this.
"""

from __future__ import annotations

from dataclasses import dataclass

from ultramem_ds.bench.decode_cost import Part
from ultramem_ds.planning.costs import distinct_rows

RUN = 64  # sorted entries of one program of ``row_runs_program``


@dataclass(frozen=True, kw_only=True)
class LookupShape:
    """One lookup.

    Attributes:
        tokens: T.
        entries: K.
        num_rows: R.
        value_dim: V.
        num_cores: h.
        expansion: E.
        element_size: bytes of a table element.
    """

    tokens: int
    entries: int = 32
    num_rows: int = 1_210_000
    value_dim: int = 512
    num_cores: int = 2
    expansion: int = 4
    element_size: int = 2

    @property
    def asked(self) -> int:
        """M."""
        return self.tokens * self.entries

    @property
    def distinct(self) -> float:
        """U, as expected of uniform ids."""
        return distinct_rows(self.asked, self.num_rows)


def lookup_programs(shape: LookupShape) -> list[Part]:
    """Every program of ``kernels/triton_programs.py``, and the sort before one of them."""
    M, U, V, h = shape.asked, shape.distinct, shape.value_dim, shape.num_cores
    bags, size = shape.tokens * shape.expansion, shape.element_size
    rows, pooled, scores = U * V * size, bags * V * size, 4 * M * h
    products = 2.0 * M * V
    partials = 2 * -(-M // RUN) * V * 4
    return [
        Part("pool_rectangular_program", rows + 16 * M + scores + pooled, products),
        Part("pool_ragged_program", rows + 8 * M + 8 * bags + scores + pooled, products),
        Part("entry_dots_program", rows + pooled + 16 * M + scores, products),
        Part("sort of the ids", 32 * M, 0.0),
        Part("row_runs_program", 24 * M + scores + pooled + 8 * U * V + partials, products),
        Part("join_runs_program", 8 * M + partials, 0.0),
        Part("row_backward_atomic_program", 16 * M + scores + pooled + 8 * U * V, products),
        Part("row_adam_program", U * (V * (4 + 2 * size + 16) + 8), 14.0 * U * V),
    ]


def forward_parts(shape: LookupShape) -> list[Part]:
    """What a lookup runs on a GPU."""
    return [part for part in lookup_programs(shape) if part.name == "pool_rectangular_program"]


def backward_parts(shape: LookupShape) -> list[Part]:
    """What its backward runs: the scores' gradients and, sorted by row, the table's."""
    names = ("entry_dots_program", "sort of the ids", "row_runs_program", "join_runs_program")
    return [part for part in lookup_programs(shape) if part.name in names]
