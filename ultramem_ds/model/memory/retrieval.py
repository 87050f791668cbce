"""Two-stage retrieval of the top-m virtual slots per head (paper sections 3.1 and 3.2).

One batched product gives the row and column scores of all heads and ranks; the top candidates of
each side span a small grid, whose exact top-m is the selection. What differs between product keys
and TDQKR (how candidates and pairs are scored) is a *form*: ``pkm.ProductKeyForm`` or
``tucker.TuckerForm``.

The selection carries no gradient. The scores of the selected pairs do: with respect to the queries,
the keys and the cores. Candidates and selection are decided in fp32 at least. Ties are broken by
``torch.topk``, which gives the same answer for the same row on the same kind of device, whatever
else is in the batch.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ultramem_ds.config.schema import Candidates, MemoryConfig, ModelConfig
from ultramem_ds.model.memory.pkm import ProductKey
from ultramem_ds.model.memory.query import LAYOUTS, QueryEncoder, qk_norm
from ultramem_ds.model.memory.tucker import TuckerCore
from ultramem_ds.model.roles import tag

# T tokens, H heads, r Tucker rank, h cores, n keys per side, m top-m, c candidates per side,
# K = H*m rows per token, d kdim. A leading 2 is the side: rows, then columns.


class Selection(NamedTuple):
    """The selected slots of each token, heads head-major, best first within a head.

    A NamedTuple: ZeRO-3 hooks its backward onto the tensors of a module's output, and looks for
    them in tuples but not in dataclasses.
    """

    slots_TK: Tensor  # int64, row * n + col, before the shuffle
    scores_TKh: Tensor  # fp32 or fp64, per core
    aux_loss: Tensor  # 0-dim, eq. 12 before alpha; 0 outside training
    conv_state: Tensor | None  # query convolution's state after these tokens


class ScoreForm(Protocol):
    """How candidates and pairs of row and column are scored; see ``tucker.TuckerForm``."""

    aux_loss: Tensor | float

    def candidate_scores(self, scores_2THnr: Tensor) -> Tensor:
        """What ranks the keys of each side, (2, T, H, n)."""
        ...

    def grid(self, row_THcr: Tensor, col_THcr: Tensor) -> Tensor:
        """Total scores of all pairs of candidates, (T, H, c, c)."""
        ...

    def pair_scores(self, row_THmr: Tensor, col_THmr: Tensor) -> Tensor:
        """Scores of matched pairs for every core, (T, H, m, h)."""
        ...


def top_candidates(scores: Tensor, top_m: int, mode: Candidates) -> Tensor:
    """Candidates of the two-stage search along the last dimension.

    Args:
        scores: (..., n) candidate scores.
        top_m: m.
        mode: ``one-sided`` the m largest; ``two-sided`` m/2 from each end; ``two-sided-full`` m
            from each end (all n where 2m >= n).

    Returns:
        int64 indices (..., c).
    """
    if mode == "one-sided":
        return scores.topk(top_m, dim=-1).indices
    per_end = top_m // 2 if mode == "two-sided" else top_m
    if 2 * per_end >= scores.shape[-1]:
        return scores.argsort(dim=-1, descending=True, stable=True)
    largest = scores.topk(per_end, dim=-1).indices
    smallest = scores.topk(per_end, dim=-1, largest=False).indices
    return torch.cat([largest, smallest], dim=-1)


def _take(scores: Tensor, index: Tensor) -> Tensor:
    """Gather along the second-last dimension: (..., n, r) at (..., c) -> (..., c, r)."""
    return scores.gather(-2, index[..., None].expand(*index.shape, scores.shape[-1]))


class Retrieval(nn.Module):
    """Queries, keys and scores of one memory layer: (B, S, D) -> ``Selection``.

    The keys are stored as (2, H, n, r, d): the normalisation runs over the contiguous last
    dimension, and one batched product covers every head and rank.
    """

    def __init__(self, model: ModelConfig, memory: MemoryConfig) -> None:
        super().__init__()
        shape = (2, memory.num_heads, memory.num_keys, memory.tucker_rank, memory.kdim)
        self.query = QueryEncoder(model, memory)
        self.keys = nn.Parameter(torch.empty(shape))
        tag(self.keys, role="matrix", init="memory_keys")
        self.keys_norm = qk_norm(memory, model.norm_eps, init="memory_keys_norm")
        self.form = TuckerCore(memory) if memory.retrieval == "tdqkr" else ProductKey()
        self.product = f"t{LAYOUTS[memory.query]}d,shnrd->sthnr"
        self.num_keys = memory.num_keys
        self.top_m = memory.top_m
        self.candidates = memory.candidates
        self.softmax = memory.softmax

    def mark_stale(self) -> None:
        """Weights changed: whatever was derived from them is recomputed at the next forward."""
        self.form.mark_stale()

    def forward(
        self,
        x_BSD: Tensor,
        doc_starts_BS: Tensor | None = None,
        conv_state: Tensor | None = None,
    ) -> Selection:
        """Select and score.

        Args:
            x_BSD: Hidden states.
            doc_starts_BS: True at the first token of a document, where the convolution restarts.
            conv_state: ``Selection.conv_state`` of the tokens before, for decoding.

        Returns:
            The selection of all T = B*S tokens.
        """
        form: ScoreForm = self.form()
        queries, conv_state = self.query(x_BSD, doc_starts_BS, conv_state)
        keys_2Hnrd = self.keys_norm(self.keys)
        scores_2THnr = torch.einsum(self.product, queries, keys_2Hnrd)
        with torch.no_grad():
            candidates_2THc = self._candidates(form, scores_2THnr)
        candidate_scores = _take(scores_2THnr, candidates_2THc)
        wide = torch.promote_types(candidate_scores.dtype, torch.float32)
        row_THcr, col_THcr = candidate_scores.to(wide).unbind(0)
        with torch.no_grad():
            pairs_THm = form.grid(row_THcr, col_THcr).flatten(-2).topk(self.top_m).indices
        num_candidates = candidates_2THc.shape[-1]
        row_pick_THm, col_pick_THm = pairs_THm // num_candidates, pairs_THm % num_candidates
        scores_THmh = form.pair_scores(_take(row_THcr, row_pick_THm), _take(col_THcr, col_pick_THm))
        if self.softmax:
            scores_THmh = scores_THmh.softmax(dim=-2)
        rows_THm = candidates_2THc[0].gather(-1, row_pick_THm)
        cols_THm = candidates_2THc[1].gather(-1, col_pick_THm)
        return Selection(
            slots_TK=(rows_THm * self.num_keys + cols_THm).flatten(1),
            scores_TKh=scores_THmh.flatten(1, 2),
            aux_loss=scores_THmh.new_zeros(()) + form.aux_loss,
            conv_state=conv_state,
        )

    def _candidates(self, form: ScoreForm, scores_2THnr: Tensor) -> Tensor:
        """Candidate rows and columns of every head, (2, T, H, c)."""
        return top_candidates(form.candidate_scores(scores_2THnr), self.top_m, self.candidates)
