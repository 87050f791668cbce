"""Pure rank arithmetic of sharded tables: who owns what, and in which order it travels.

Nothing here communicates or knows a process group, so everything is tested without processes.

Letters: T tokens, K rows per token, M entries on the move, N rows of the table, V value width,
R rows on one rank, P ranks, E expansion (projectors), h cores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ultramem_ds.config.schema import MemoryConfig
from ultramem_ds.sharding.blocks import Block

SCHEMES = ("number-wise", "dimension-wise", "owner-pooled")


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """Global shape of one value table.

    Raises:
        ValueError: a size below one, or cores that do not divide the value width.
    """

    num_rows: int  # N
    value_dim: int  # V
    num_projectors: int = 1  # E
    num_cores: int = 1  # h
    name: str = "value table"  # for error messages

    def __post_init__(self) -> None:
        for key in ("num_rows", "value_dim", "num_projectors", "num_cores"):
            if getattr(self, key) < 1:
                raise ValueError(f"{self.name}: {key}={getattr(self, key)} must be at least 1")
        if self.value_dim % self.num_cores:
            raise ValueError(
                f"{self.name}: value_dim={self.value_dim} must be divisible by "
                f"num_cores={self.num_cores}"
            )

    @classmethod
    def from_config(cls, memory: MemoryConfig, table_index: int) -> TableSpec:
        """The table of one memory layer (0-based among the memory layers)."""
        return cls(
            num_rows=memory.num_rows,
            value_dim=memory.value_dim,
            num_projectors=memory.expansion,
            num_cores=memory.num_cores,
            name=f"value table {table_index}",
        )


@dataclass(frozen=True)
class ShardLayout:
    """The block of a table that one rank holds: rows x columns, rows padded to a full block.

    ``full_shape`` is that of the whole parameter, laid out so that the flat slice of rank p of P
    is its block: (N padded, V) by rows, (P, N, V/P) by columns.
    """

    full_shape: tuple[int, ...]
    first_row: int
    num_rows: int  # rows held, padding included
    first_column: int
    num_columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the held block."""
        return (self.num_rows, self.num_columns)

    def block(self, spec: TableSpec) -> Block:
        """The held block without padding rows."""
        num_rows = max(0, min(self.num_rows, spec.num_rows - self.first_row))
        return Block(self.first_row, num_rows, self.first_column, self.num_columns)


def rows_per_rank(num_rows: int, world_size: int) -> int:
    """Rows each rank holds when rows are split: N padded up to a multiple of P, over P."""
    return -(-num_rows // world_size)


def padded_rows(num_rows: int, world_size: int) -> int:
    """N rounded up so that every rank holds the same number of whole rows."""
    return rows_per_rank(num_rows, world_size) * world_size


def shard_layout(spec: TableSpec, scheme: str, world_size: int, rank: int) -> ShardLayout:
    """The block of ``spec`` that ``rank`` of ``world_size`` holds under ``scheme``.

    Number-wise and owner-pooled give whole rows (N padded to a multiple of P), dimension-wise
    gives V/P columns of all rows; with one rank each is the whole table.

    Raises:
        ValueError: an unknown scheme, or V not divisible by P under dimension-wise.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"memory.partition={scheme!r} is none of {', '.join(SCHEMES)}")
    if scheme == "dimension-wise":
        if spec.value_dim % world_size:
            raise ValueError(
                f"{spec.name}: dimension-wise needs memory.value_dim={spec.value_dim} divisible "
                f"by the {world_size} ranks that share a table; choose another memory.partition "
                f"or memory.shard_group_size"
            )
        columns = spec.value_dim // world_size
        sliced_shape = (world_size, spec.num_rows, columns)
        return ShardLayout(sliced_shape, 0, spec.num_rows, rank * columns, columns)
    rows = rows_per_rank(spec.num_rows, world_size)
    full_shape = (rows * world_size, spec.value_dim)
    return ShardLayout(full_shape, rank * rows, rows, 0, spec.value_dim)


def id_dtype(num_ids: int) -> torch.dtype:
    """Narrowest of int32 and int64 that holds 0 .. num_ids - 1."""
    return torch.int32 if num_ids <= 2**31 else torch.int64


@dataclass(frozen=True)
class Route:
    """How looked-up entries leave this rank and where their answers land.

    ``send_M`` holds each entry's row within its owner's block, entries grouped by owner;
    ``counts_P`` how many go to each owner: their sum is how much of ``send_M`` is sent, which the
    device knows and the host only once counts have been exchanged. The answer to entry (t, k) is
    row ``position_TK[t, k]`` of the answers laid out in the order sent.
    """

    send_M: Tensor
    counts_P: Tensor
    position_TK: Tensor


def count_ids(ids_M: Tensor, num_ids: int, weights_M: Tensor | None = None) -> Tensor:
    """How often each of 0 .. num_ids - 1 occurs (or sums of int64 weights), without a host sync.

    ``torch.bincount`` asks the device for the largest id before it allocates.
    """
    if weights_M is None:
        weights_M = torch.ones_like(ids_M)
    return ids_M.new_zeros(num_ids).scatter_add_(0, ids_M, weights_M)


def route_entries(rows_TK: Tensor, block_rows: int, world_size: int) -> Route:
    """Every entry travels, also when its row was asked for before.

    Example with P = 2, R = 4: rows [[5, 1], [1, 6]] have owners [[1, 0], [0, 1]]; sent are
    [1, 1 | 1, 2] (local rows), counts [2, 2], and the positions are [[2, 0], [1, 3]].
    Out-of-range rows go to the nearest owner: the caller has counted them and will raise.
    """
    rows_M = rows_TK.reshape(-1)
    owner_M = torch.div(rows_M, block_rows, rounding_mode="floor").clamp_(0, world_size - 1)
    # Few owners: a byte key sorts several times faster than the 64-bit one.
    key_M = owner_M.to(torch.uint8) if world_size <= 256 else owner_M
    order_M = torch.sort(key_M, stable=True).indices
    position_M = torch.empty_like(order_M)
    position_M[order_M] = torch.arange(order_M.numel(), device=order_M.device)
    send_M = (rows_M - owner_M * block_rows)[order_M]
    counts_P = count_ids(owner_M, world_size)
    return Route(send_M, counts_P, position_M.view(rows_TK.shape))


def route_distinct(rows_TK: Tensor, block_rows: int, world_size: int) -> Route:
    """Each distinct row travels once; entries that share a row share its answer.

    Example with P = 2, R = 4: rows [[5, 1], [1, 6]] send [1 | 1, 2], counts [1, 2], and the
    positions are [[1, 0], [0, 2]]. What lies in ``send_M`` behind the distinct rows is not sent.
    """
    sorted_M, order_M = torch.sort(rows_TK.reshape(-1), stable=True)
    first_M = torch.ones_like(sorted_M)
    first_M[1:] = sorted_M[1:] != sorted_M[:-1]
    place_M = first_M.cumsum(0) - 1  # of the entry's row among the distinct ones
    owner_M = torch.div(sorted_M, block_rows, rounding_mode="floor").clamp_(0, world_size - 1)
    # Entries of one row write the same number to the same place.
    send_M = torch.zeros_like(sorted_M).scatter_(0, place_M, sorted_M - owner_M * block_rows)
    position_M = torch.empty_like(place_M).scatter_(0, order_M, place_M)
    counts_P = count_ids(owner_M, world_size, first_M)
    return Route(send_M, counts_P, position_M.view(rows_TK.shape))


@dataclass(frozen=True)
class BagRoute:
    """How entries leave for owners that pool them per (token, projector).

    Entries are ordered by owner, then slot t * E + p, then k; ``order_M`` is that order as indices
    into the flattened entries, ``send_M`` the row within the owner's block, ``slot_M`` the slot,
    ``starts_M`` True where a bag begins. ``counts_P`` and ``bag_counts_P`` are per owner.
    """

    order_M: Tensor
    send_M: Tensor
    slot_M: Tensor
    starts_M: Tensor
    counts_P: Tensor
    bag_counts_P: Tensor


def route_bags(
    rows_TK: Tensor,
    projectors_TK: Tensor,
    num_projectors: int,
    block_rows: int,
    world_size: int,
) -> BagRoute:
    """Sorts entries into bags, one per owner, token and projector.

    Example with P = 2, R = 4, E = 2: rows [[5, 1, 7], [1, 6, 2]], projectors [[0, 0, 0],
    [1, 0, 1]]. Owner 0 gets token 0's row 1 (slot 0) and token 1's rows 1, 2 (slot 3); owner 1
    gets rows 5, 7 of slot 0 and row 6 of slot 2. Sent are [1, 1, 2 | 1, 3, 2], bags start at
    [T, T, F | T, F, T], order is [1, 3, 5 | 0, 2, 4].
    """
    num_tokens = rows_TK.shape[0]
    rows_M = rows_TK.reshape(-1)
    owner_M = torch.div(rows_M, block_rows, rounding_mode="floor").clamp_(0, world_size - 1)
    token_T1 = torch.arange(num_tokens, device=rows_TK.device)[:, None]
    slot_M = (token_T1 * num_projectors + projectors_TK).reshape(-1)
    num_slots = num_tokens * num_projectors
    key_M, order_M = torch.sort(owner_M * num_slots + slot_M, stable=True)
    starts_M = torch.ones_like(key_M, dtype=torch.bool)
    starts_M[1:] = key_M[1:] != key_M[:-1]
    owner_M = owner_M[order_M]
    return BagRoute(
        order_M=order_M,
        send_M=rows_M[order_M] - owner_M * block_rows,
        slot_M=slot_M[order_M],
        starts_M=starts_M,
        counts_P=count_ids(owner_M, world_size),
        bag_counts_P=count_ids(owner_M, world_size, starts_M.long()),
    )


def mark_bag_starts(rows_M: Tensor, starts_M: Tensor) -> Tensor:
    """Row ids with the first of each bag complemented (-1 - id): the sign bit costs no bytes."""
    return torch.where(starts_M, ~rows_M, rows_M)


def nonzero_places(mask_M: Tensor, count: int) -> Tensor:
    """Where a mask is True; the caller knows how often, so that the device need not be asked."""
    return torch.nonzero_static(mask_M, size=count).view(-1)


def bag_starts(marked_M: Tensor, num_bags: int) -> tuple[Tensor, Tensor]:
    """Undoes ``mark_bag_starts``: int64 rows_M, and offsets_B1 of the bags among them."""
    starts_B = nonzero_places(marked_M < 0, num_bags)
    offsets_B1 = torch.cat([starts_B, starts_B.new_tensor([marked_M.numel()])])
    return torch.where(marked_M < 0, ~marked_M, marked_M).long(), offsets_B1


def column_pieces(spec: TableSpec, layout: ShardLayout) -> list[int]:
    """The core that scores each equal piece of a rank's columns, in column order.

    Core i scores columns [i V/h, (i+1) V/h). A rank's columns may lie inside one core, span
    several, or be cut by a boundary; pieces of gcd(V/h, V/P) columns never are. Example with
    V = 12, h = 3, P = 2: pieces of 2 columns, rank 0 (columns 0-5) has cores [0, 0, 1].
    """
    core_columns = spec.value_dim // spec.num_cores
    piece = math.gcd(core_columns, layout.num_columns)
    first, end = layout.first_column, layout.first_column + layout.num_columns
    return [column // core_columns for column in range(first, end, piece)]
