"""Owner-pooled partition: whole rows on each rank, the owner weights and pools, sums travel.

Letters: T tokens, K rows per token, h cores, M entries on the move, B bags on the move (one per
token, projector and owner), V value width, R rows on this rank, E expansion, P ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ultramem_ds.kernels import bag_reduce
from ultramem_ds.sharding.scheme import Scheme, Splits, agree_on_splits, count_bad_rows
from ultramem_ds.sharding.table_plan import (
    bag_starts,
    id_dtype,
    mark_bag_starts,
    nonzero_places,
    route_bags,
)


@dataclass(frozen=True)
class OwnerPooledRequest:
    """The bags this rank pools for the group, and where home adds the sums that come back."""

    wanted_M: Tensor  # rows of this rank's block, by asking rank and bag; starts of bags marked
    scores_Mh: Tensor  # their scores, in the wire's dtype
    bag_splits: Splits  # bags asked of each rank, and by each rank
    slot_B: Tensor  # t * E + p of each bag asked, in the order asked
    num_tokens: int  # T


class OwnerPooled(Scheme[OwnerPooledRequest]):
    """Ids and scores to the owners, one partial sum per (token, projector, owner) back.

    Goals: as number-wise, every rank reads its own block in whole rows; but up to K / E rows of a
    token become one vector before they travel. Phases: counts, ids, scores, sums; in the backward
    the sums' gradients go out and the scores' gradients come home. Which entries form a bag costs
    no bytes: the sign bit of the first id of each bag tells.
    """

    def input_dist(
        self, rows_TK: Tensor, projectors_TK: Tensor, scores_TKh: Tensor
    ) -> OwnerPooledRequest:
        """Row ids (4 bytes each) and scores to the owners, sorted by owner, token, projector."""
        spec, block_rows = self.shard.spec, self.shard.layout.num_rows
        route = route_bags(
            rows_TK, projectors_TK, spec.num_projectors, block_rows, self.comm.world_size
        )
        splits, bag_splits = agree_on_splits(
            self.comm, (route.counts_P, route.bag_counts_P), count_bad_rows(rows_TK, spec), spec
        )
        ids_M = mark_bag_starts(route.send_M, route.starts_M).to(id_dtype(block_rows))
        scores_Mh = scores_TKh.flatten(0, 1).index_select(0, route.order_M).to(self.wire_dtype)
        return OwnerPooledRequest(
            self.comm.all_to_all(ids_M, splits.send, splits.recv, "ids"),
            self.comm.all_to_all(scores_Mh, splits.send, splits.recv, "scores"),
            bag_splits,
            route.slot_M[nonzero_places(route.starts_M, sum(bag_splits.send))],
            rows_TK.shape[0],
        )

    def compute(self, request: OwnerPooledRequest) -> Tensor:
        """One weighted sum per bag asked for, (B, V) in the wire's dtype."""
        rows_M, offsets_B1 = bag_starts(request.wanted_M, sum(request.bag_splits.recv))
        opened = self.shard.open(rows_M)
        sums_BV = bag_reduce(
            opened.values_RV,
            opened.rows,
            offsets_B1,
            request.scores_Mh,
            grad_values_RV=opened.grad_sink_RV,
            kernel=self.kernel,
        )
        return sums_BV.to(self.wire_dtype)

    def output_dist(self, answer: Tensor, request: OwnerPooledRequest) -> Tensor:
        """Sums back to who asked, added per (token, projector) over the owners in rank order."""
        splits, spec = request.bag_splits, self.shard.spec
        received_BV = self.comm.all_to_all(answer, splits.recv, splits.send, "pooled")
        dtype = self.shard.values().dtype
        num_slots = request.num_tokens * spec.num_projectors
        pooled_SV: Tensor = _AddIntoSlots.apply(received_BV, request.slot_B, splits.send, num_slots)
        return pooled_SV.to(dtype).view(-1, spec.num_projectors, spec.value_dim)


class _AddIntoSlots(torch.autograd.Function):
    """(B, V) sums of all owners, owner after owner -> (slots, V), added in fp32 and up."""

    @staticmethod
    def forward(
        ctx: Any, received_BV: Tensor, slot_B: Tensor, splits: list[int], num_slots: int
    ) -> Tensor:
        ctx.save_for_backward(slot_B)
        ctx.dtype = received_BV.dtype
        dtype = torch.promote_types(received_BV.dtype, torch.float32)
        pooled_SV = received_BV.new_zeros((num_slots, received_BV.shape[1]), dtype=dtype)
        for slots, sums in zip(slot_B.split(splits), received_BV.split(splits)):
            # One owner names a slot once: the order of additions is fixed, on CUDA too.
            pooled_SV.index_add_(0, slots, sums.to(dtype))
        return pooled_SV

    @staticmethod
    def backward(ctx: Any, grad_SV: Tensor) -> tuple[Tensor, None, None, None]:
        (slot_B,) = ctx.saved_tensors
        return grad_SV.to(ctx.dtype).index_select(0, slot_B), None, None, None
