"""A memory layer transcribed from the paper into plain torch: the yardstick of ``bench layer``.

Simple, but without avoidable work: no loops, no copies but those the formulas ask for. What it
does not do is what ``model/memory`` does beyond the formulas: keep normalised keys, fold them for
the search, look rows up without gathering them.

Letters: T tokens, D hidden, H heads, n keys per side, r rank, h cores, m top-m, K = m*H, E
expansion, N physical rows, V value width, d kdim. A leading 2 is the side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultramem_ds.model.memory.layer import MemoryLayer


class OracleLayer:
    """Equations 5 to 16 on the parameters of a :class:`MemoryLayer` (shared query, TDQKR).

    The permutation of virtual slots is a stored table, as in the authors' released layer.
    """

    def __init__(self, layer: MemoryLayer, expansion: int, eps: float) -> None:
        self.layer = layer
        self.expansion = expansion
        self.eps = eps
        num_slots = expansion * layer.num_rows
        self.permutation = torch.empty(num_slots, dtype=torch.int64)
        for begin in range(0, num_slots, 1 << 20):
            slots = torch.arange(begin, min(begin + (1 << 20), num_slots))
            self.permutation[begin : begin + len(slots)] = layer.shuffle(slots)

    def __call__(self, x_TD: Tensor) -> Tensor:
        """``(T, D)`` to ``(T, D)``."""
        retrieval, m = self.layer.retrieval, self.layer.retrieval.top_m
        form = retrieval.form()
        assert form.core_hHrr is not None
        T = x_TD.shape[0]
        convolved, _ = retrieval.query.conv(x_TD[None], None, None)
        query_T2d = retrieval.query.proj(convolved[0]).view(T, 2, -1)
        query_T2d = self._norm(query_T2d, retrieval.query.norm)
        keys_2Hnrd = self._norm(retrieval.keys.weight, retrieval.keys.norm)
        scores_2THnr = torch.einsum("tsd,shnrd->sthnr", query_T2d, keys_2Hnrd)
        ranked_2THn = torch.einsum("sthnr,shr->sthn", scores_2THnr, form.directions_2Hr)
        index_2THm = ranked_2THn.topk(m, dim=-1).indices
        rank = scores_2THnr.shape[-1]
        picked = scores_2THnr.gather(3, index_2THm[..., None].expand(*index_2THm.shape, rank))
        grid_THhmm = torch.einsum("thia,chab,thjb->thcij", picked[0], form.core_hHrr, picked[1])
        best_THm = grid_THhmm.sum(2).flatten(-2).topk(m, dim=-1).indices
        num_cores = grid_THhmm.shape[2]
        each_THhm = best_THm[:, :, None].expand(-1, -1, num_cores, -1)
        scores_TKh = grid_THhmm.flatten(-2).gather(3, each_THhm).transpose(2, 3).flatten(1, 2)
        rows_THm = index_2THm[0].gather(-1, best_THm // m)
        cols_THm = index_2THm[1].gather(-1, best_THm % m)
        slots_TK = self.permutation[(rows_THm * retrieval.num_keys + cols_THm).flatten(1)]
        return self._pool(slots_TK, scores_TKh)

    def _pool(self, slots_TK: Tensor, scores_TKh: Tensor) -> Tensor:
        """Weighted sums per projector, projected and summed."""
        num_rows, (T, K, h) = self.layer.num_rows, scores_TKh.shape
        values_TKV = F.embedding(slots_TK % num_rows, self.layer.values.weight)
        weighted_TKV = (values_TKV.view(T, K, h, -1) * scores_TKh[..., None]).flatten(2)
        mine_TKE = F.one_hot(slots_TK // num_rows, self.expansion).to(weighted_TKV.dtype)
        pooled_TEV = torch.einsum("tke,tkv->tev", mine_TKE, weighted_TKV)
        return self.layer.value_proj(pooled_TEV.flatten(1))

    def _norm(self, x: Tensor, norm: nn.Module) -> Tensor:
        assert isinstance(norm, nn.LayerNorm)
        return F.layer_norm(x, x.shape[-1:], norm.weight, eps=self.eps)
