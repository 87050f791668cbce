"""Pure arithmetic of parameter pieces: which elements of a parameter lie where in a flat buffer.

A checkpoint and a running optimizer hold every parameter in pieces, cut by ZeRO into flat ranges
and by the partition scheme into blocks of rows or columns. Both cuts are one thing here: a block of
the parameter seen as a matrix. A value table is its (N, V) matrix, without padding rows; any other
parameter is a matrix of one column, so that its blocks are flat ranges. Moving a parameter from one
layout to another is copying the overlaps of two lists of blocks.

Letters: N rows of a table, V its columns, R rows and C columns of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Block:
    """Rows [first_row, first_row + num_rows) and as many columns of a matrix."""

    first_row: int
    num_rows: int
    first_column: int
    num_columns: int

    @property
    def numel(self) -> int:
        """Elements."""
        return self.num_rows * self.num_columns

    def overlap(self, other: Block) -> Block:
        """What both hold; without elements if they are disjoint."""
        row, rows = _overlap(self.first_row, self.num_rows, other.first_row, other.num_rows)
        column, columns = _overlap(
            self.first_column, self.num_columns, other.first_column, other.num_columns
        )
        return Block(row, rows, column, columns)

    def cut(self, matrix_RC: Tensor, part: Block) -> Tensor:
        """The view of ``part`` in this block's values ``matrix_RC``; part lies in this block."""
        rows_rC = matrix_RC.narrow(0, part.first_row - self.first_row, part.num_rows)
        return rows_rC.narrow(1, part.first_column - self.first_column, part.num_columns)


def _overlap(first: int, count: int, other_first: int, other_count: int) -> tuple[int, int]:
    begin = max(first, other_first)
    return begin, max(0, min(first + count, other_first + other_count) - begin)


@dataclass(frozen=True)
class Piece:
    """A block of parameter ``name``, row-major at ``offset`` of flat buffer number ``buffer``."""

    name: str
    buffer: int
    offset: int
    block: Block

    def view(self, flat: Tensor) -> Tensor:
        """The block's values (R, C) inside its flat buffer."""
        block = self.block
        return flat.narrow(0, self.offset, block.numel).view(block.num_rows, block.num_columns)


def flat_range(first: int, count: int) -> Block:
    """Elements [first, first + count) of a parameter without row structure."""
    return Block(first, count, 0, 1)


def whole(shape: Iterable[int], is_table: bool) -> Block:
    """All of a parameter: (N, V) for a table, one column for any other."""
    if is_table:
        num_rows, num_columns = shape
        return Block(0, num_rows, 0, num_columns)
    return flat_range(0, math.prod(shape))
