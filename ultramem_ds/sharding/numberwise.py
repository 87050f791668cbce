"""Number-wise partition (paper App. D): whole rows on each rank, rows travel, pooling at home.

Letters: T tokens, K rows per token, h cores, M entries on the move, V value width, R rows on
this rank, E expansion, P ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ultramem_ds.config.schema import MemoryConfig
from ultramem_ds.kernels import lookup_reduce, resolve
from ultramem_ds.kernels.base import Kernel
from ultramem_ds.sharding.comm import Comm
from ultramem_ds.sharding.scheme import Scheme, Splits, agree_on_splits, count_bad_rows
from ultramem_ds.sharding.shard import TableShard
from ultramem_ds.sharding.table_plan import id_dtype, route_distinct, route_entries


@dataclass(frozen=True)
class NumberWiseRequest:
    """What owners were asked (``wanted_M``), and what home needs to pool the answers."""

    wanted_M: Tensor  # rows of this rank's block that the group asked for, by asking rank
    splits: Splits
    position_TK: Tensor  # where each entry's row will be among the received ones
    projectors_TK: Tensor
    scores_TKh: Tensor


class NumberWise(Scheme[NumberWiseRequest]):
    """Ids to the owners, rows back (their gradients the other way), weights stay at home.

    Goals: every rank reads only its own block, in whole rows; nothing of the table's size moves.
    Phases: counts, ids, rows; in the backward one exchange, of the rows' gradients. With
    ``memory.dedup`` each distinct row crosses the wire once per rank and lookup.
    """

    def __init__(self, shard: TableShard, comm: Comm, memory: MemoryConfig) -> None:
        super().__init__(shard, comm, memory)
        self.route = route_distinct if memory.dedup else route_entries

    def input_dist(
        self, rows_TK: Tensor, projectors_TK: Tensor, scores_TKh: Tensor
    ) -> NumberWiseRequest:
        """Row ids to their owners, 4 bytes each."""
        spec, block_rows = self.shard.spec, self.shard.layout.num_rows
        route = self.route(rows_TK, block_rows, self.comm.world_size)
        num_bad = count_bad_rows(rows_TK, spec)
        (splits,) = agree_on_splits(self.comm, (route.counts_P,), num_bad, spec)
        ids_M = route.send_M[: sum(splits.send)].to(id_dtype(block_rows))
        wanted_M = self.comm.all_to_all(ids_M, splits.send, splits.recv, "ids")
        return NumberWiseRequest(wanted_M, splits, route.position_TK, projectors_TK, scores_TKh)

    def compute(self, request: NumberWiseRequest) -> Tensor:
        """The rows asked for, (M, V) in the wire's dtype."""
        rows_MV = gather_rows(self.shard, request.wanted_M.long(), self.kernel)
        return rows_MV.to(self.wire_dtype)

    def output_dist(self, answer: Tensor, request: NumberWiseRequest) -> Tensor:
        """Rows back to who asked, then weighting and pooling."""
        splits = request.splits
        received_MV = self.comm.all_to_all(answer, splits.recv, splits.send, "rows")
        return lookup_reduce(
            received_MV.to(self.shard.values().dtype),
            request.position_TK,
            request.projectors_TK,
            request.scores_TKh,
            self.shard.spec.num_projectors,
            kernel=self.kernel,
        )


def gather_rows(shard: TableShard, rows_M: Tensor, kernel: str) -> Tensor:
    """values[rows], (M, V); the backward adds into the shard's gradient instead of the graph."""
    opened = shard.open(rows_M)
    values_RV = opened.values_RV.requires_grad_(torch.is_grad_enabled())
    rows_MV: Tensor = _GatherRows.apply(
        values_RV, opened.rows, opened.grad_sink_RV, resolve(kernel, values_RV.device)
    )
    return rows_MV


class _GatherRows(torch.autograd.Function):
    """Row gather whose gradient is accumulated in place, in fp32, in the order of the request."""

    @staticmethod
    def forward(
        ctx: Any, values_RV: Tensor, rows_M: Tensor, grad_RV: Tensor | None, kernel: Kernel
    ) -> Tensor:
        ctx.save_for_backward(rows_M)
        ctx.grad_RV, ctx.kernel = grad_RV, kernel
        return values_RV.index_select(0, rows_M)

    @staticmethod
    def backward(ctx: Any, grad_MV: Tensor) -> tuple[None, None, None, None]:
        (rows_M,) = ctx.saved_tensors
        ctx.kernel.add_rows_(ctx.grad_RV, rows_M, grad_MV.to(ctx.grad_RV.dtype))
        return None, None, None, None
