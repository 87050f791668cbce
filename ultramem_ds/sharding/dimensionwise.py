"""Dimension-wise partition (paper App. D): V/P columns of all rows on each rank.

Letters: T tokens of one rank, A tokens of all ranks of the group, K rows per token, h cores,
N rows of the table, V value width, C = V/P columns on this rank, E expansion, P ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ultramem_ds.config.schema import MemoryConfig
from ultramem_ds.kernels import lookup_reduce
from ultramem_ds.sharding.comm import Category, Comm
from ultramem_ds.sharding.scheme import Scheme, Splits, agree_on_splits, count_bad_rows
from ultramem_ds.sharding.shard import TableShard
from ultramem_ds.sharding.table_plan import column_pieces, id_dtype


@dataclass(frozen=True)
class DimensionWiseRequest:
    """The lookups of all ranks, rank after rank."""

    rows_AK: Tensor
    projectors_AK: Tensor
    scores_AKh: Tensor  # in the wire's dtype
    splits: Splits  # this rank's T for every rank, and every rank's T


class DimensionWise(Scheme[DimensionWiseRequest]):
    """Everybody gets all ids and scores, pools its columns, and sends each rank its tokens'.

    Goals: what travels back is pooled, E vectors of V columns per token whatever K is. Phases:
    counts, all-gather of ids and scores, all-to-all of pooled columns; in the backward the pooled
    columns' gradients go out and the scores' gradients, partial over columns, are added at home.
    Row and projector travel as one id, projector * N + row.
    """

    def __init__(self, shard: TableShard, comm: Comm, memory: MemoryConfig) -> None:
        super().__init__(shard, comm, memory)
        self.piece_cores = column_pieces(shard.spec, shard.layout)

    def input_dist(
        self, rows_TK: Tensor, projectors_TK: Tensor, scores_TKh: Tensor
    ) -> DimensionWiseRequest:
        """All-gather of slot ids (4 bytes each up to 2^31 slots) and scores."""
        spec = self.shard.spec
        counts_P = torch.full((self.comm.world_size,), rows_TK.shape[0], device=rows_TK.device)
        (splits,) = agree_on_splits(self.comm, (counts_P,), count_bad_rows(rows_TK, spec), spec)
        slots_TK = projectors_TK * spec.num_rows + rows_TK
        slots_AK = self._gather(
            slots_TK.to(id_dtype(spec.num_rows * spec.num_projectors)), splits, "ids"
        ).long()
        return DimensionWiseRequest(
            slots_AK % spec.num_rows,
            slots_AK // spec.num_rows,
            self._gather(scores_TKh.to(self.wire_dtype), splits, "scores"),
            splits,
        )

    def compute(self, request: DimensionWiseRequest) -> Tensor:
        """This rank's columns of all ranks' pooled values, (A, E, C) in the wire's dtype."""
        opened = self.shard.open(request.rows_AK)
        pooled_AEC = lookup_reduce(
            opened.values_RV,
            opened.rows,
            request.projectors_AK,
            torch.stack([request.scores_AKh[..., core] for core in self.piece_cores], dim=2),
            self.shard.spec.num_projectors,
            grad_values_RV=opened.grad_sink_RV,
            kernel=self.kernel,
        )
        return pooled_AEC.to(self.wire_dtype)

    def output_dist(self, answer: Tensor, request: DimensionWiseRequest) -> Tensor:
        """Each rank gets its tokens' columns from every rank."""
        splits, spec = request.splits, self.shard.spec
        columns = self.comm.all_to_all(answer, splits.recv, splits.send, "pooled")
        pooled_PTEC = columns.view(self.comm.world_size, -1, *answer.shape[1:])
        pooled_TEV = pooled_PTEC.permute(1, 2, 0, 3).flatten(2)
        assert pooled_TEV.shape[2] == spec.value_dim
        return pooled_TEV.to(self.shard.values().dtype)

    def _gather(self, x_T: Tensor, splits: Splits, category: Category) -> Tensor:
        """(T, ...) of every rank, one after the other; padded to the longest on the wire."""
        padding = x_T.new_zeros((max(splits.recv) - x_T.shape[0], *x_T.shape[1:]))
        gathered_PT = self.comm.all_gather(torch.cat([x_T, padding]), category)
        return torch.cat([rank_T[:count] for rank_T, count in zip(gathered_PT, splits.recv)])
