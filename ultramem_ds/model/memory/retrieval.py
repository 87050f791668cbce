"""Two-stage retrieval of the top-m virtual slots per head (paper sections 3.1 and 3.2).

One batched product searches the keys of all heads on both sides; the top candidates of each side
span a small grid, whose exact top-m is the selection. What differs between product keys and TDQKR
(which directions are searched, how pairs are scored) is a *form*: ``pkm.ProductKeyForm`` or
``tucker.TuckerForm``.

The selection carries no gradient. The scores of the selected pairs do: with respect to the queries,
the keys and the cores. Candidates are ranked in the compute dtype, their grid in fp32 at least.
In fp32 on a CPU one native call selects (``kernels/select``), else torch. Ties are broken by either
in its own way: the same answer for the same scores on the same kind of device, whatever else is in
the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ultramem_ds.config.memory import Candidates, MemoryConfig
from ultramem_ds.config.schema import ModelConfig
from ultramem_ds.kernels.native import native_library
from ultramem_ds.kernels.select import select_slots
from ultramem_ds.model.memory.dots import row_dots
from ultramem_ds.model.memory.forms import ScoreForm
from ultramem_ds.model.memory.keys import ProductKeys
from ultramem_ds.model.memory.pkm import ProductKey
from ultramem_ds.model.memory.query import LAYOUTS, QueryEncoder, query_groups
from ultramem_ds.model.memory.recall import exhaustive_recall
from ultramem_ds.model.memory.tucker import TuckerCore, TuckerForm

# T tokens, H heads, r Tucker rank, h cores, n keys per side, m top-m, c candidates per side,
# K = H*m rows per token, G distinct queries of a token, d kdim. A leading 2 is the side.


class Diagnosis(NamedTuple):
    """What training-state statistics want to know of a retrieval; no gradients."""

    recall: Tensor  # 0-dim, see ``recall.exhaustive_recall``
    singular_values_r: Tensor  # of the summed core, mean over heads; empty for product keys


# Form, queries, keys (2, H, n, r, d) and search keys -> slots (T, H, m), scores (T, H, m, h).
Select: TypeAlias = Callable[[ScoreForm, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Selection(NamedTuple):
    """The selected slots of each token, heads head-major, best first within a head.

    A NamedTuple: ZeRO-3 hooks its backward onto the tensors of a module's output, and looks for
    them in tuples but not in dataclasses.
    """

    slots_TK: Tensor  # int64, row * n + col, before the shuffle
    scores_TKh: Tensor  # fp32 or fp64, per core
    aux_loss: Tensor  # 0-dim, eq. 12 before alpha; 0 outside training
    conv_state: Tensor | None  # query convolution's state after these tokens
    diagnosis: Diagnosis | None  # None where not asked for


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


def best_pairs(form: ScoreForm, scores_2THcr: Tensor, top_m: int) -> tuple[Tensor, Tensor]:
    """Top-m of the grid that the candidates span, best first.

    Args:
        form: Scores pairs.
        scores_2THcr: Row and column scores of the candidates.
        top_m: m.

    Returns:
        Candidate numbers of the selected pairs, (2, T, H, m), no gradient; and the pairs'
        scores per core, (T, H, m, h).
    """
    num_candidates, rank = scores_2THcr.shape[-2:]
    with torch.no_grad():
        pairs_THm = form.grid(*scores_2THcr.unbind(0)).flatten(-2).topk(top_m).indices
        picks_2THm = torch.stack([pairs_THm // num_candidates, pairs_THm % num_candidates])
    picked = scores_2THcr.gather(-2, picks_2THm[..., None].expand(*picks_2THm.shape, rank))
    return picks_2THm, form.pair_scores(*picked.unbind(0))


class Retrieval(nn.Module):
    """Queries, keys and scores of one memory layer: (B, S, D) -> ``Selection``."""

    def __init__(self, model: ModelConfig, memory: MemoryConfig) -> None:
        super().__init__()
        self.query = QueryEncoder(model, memory)
        self.form = TuckerCore(memory) if memory.retrieval == "tdqkr" else ProductKey(memory)
        self.keys = ProductKeys(memory, model.norm_eps)
        self.layout = LAYOUTS[memory.query]
        self.select: Select = self.two_stage_select  # infer/ may put a faster one here
        self.best_pairs = torch.compile(best_pairs) if memory.compile else best_pairs
        self.num_keys = memory.num_keys
        self.top_m = memory.top_m
        self.candidates = memory.candidates
        self.softmax = memory.softmax
        self.kernel = memory.kernel

    def mark_stale(self) -> None:
        """Weights changed: whatever was derived from them is recomputed at the next forward."""
        self.form.mark_stale()
        self.keys.mark_stale()

    def forward(
        self,
        x_BSD: Tensor,
        doc_starts_BS: Tensor | None = None,
        conv_state: Tensor | None = None,
        recall_tokens: int = 0,
    ) -> Selection:
        """Select and score.

        Args:
            x_BSD: Hidden states.
            doc_starts_BS: True at the first token of a document, where the convolution restarts.
            conv_state: ``Selection.conv_state`` of the tokens before, for decoding.
            recall_tokens: Diagnose the search on that many tokens, evenly spaced; 0 = do not.

        Returns:
            The selection of all T = B*S tokens.
        """
        form: ScoreForm = self.form()
        queries, conv_state = self.query(x_BSD, doc_starts_BS, conv_state)
        keys_2Hnrd, search = self.keys(form.directions_2Hr)
        slots_THm, scores_THmh = self.select(form, queries, keys_2Hnrd, search)
        diagnosis = None
        if recall_tokens:
            every = max(1, len(queries) // recall_tokens)
            diagnosis = self._diagnose(form, queries[::every], keys_2Hnrd, slots_THm[::every])
        if self.softmax:
            scores_THmh = scores_THmh.softmax(dim=-2)
        return Selection(
            slots_TK=slots_THm.flatten(1),
            scores_TKh=scores_THmh.flatten(1, 2),
            aux_loss=scores_THmh.new_zeros(()) + form.aux_loss,
            conv_state=conv_state,
            diagnosis=diagnosis,
        )

    def two_stage_select(
        self, form: ScoreForm, queries: Tensor, keys_2Hnrd: Tensor, search: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Slots ``(T, H, m)`` and scores per core ``(T, H, m, h)``, best first."""
        library = native_library(queries, keys_2Hnrd, kernel=self.kernel)
        if library is not None and self.candidates == "one-sided":
            plain = queries.detach()
            return select_slots(
                library,
                lambda tokens: torch.einsum(self._product(""), plain[tokens], search),
                queries.flatten(1, -2),
                query_groups(self.layout, keys_2Hnrd.shape[1], keys_2Hnrd.shape[3]),
                keys_2Hnrd,
                form.core_hHrr if isinstance(form, TuckerForm) else None,
                self.top_m,
            )
        with torch.no_grad():
            candidates_2THc = self._search(queries, search)
        scores_2THcr = self._exact_scores(queries, keys_2Hnrd, candidates_2THc)
        picks_2THm, scores_THmh = self.best_pairs(form, scores_2THcr, self.top_m)
        rows_THm, cols_THm = candidates_2THc.gather(-1, picks_2THm).unbind(0)
        return rows_THm * self.num_keys + cols_THm, scores_THmh

    def _product(self, ranks: str) -> str:
        """Einsum of queries with keys; ``ranks`` is "r" to keep the ranks apart."""
        return f"t{self.layout}d,shnrd->sthn{ranks}"

    @torch.no_grad()
    def _diagnose(
        self, form: ScoreForm, queries: Tensor, keys_2Hnrd: Tensor, slots_THm: Tensor
    ) -> Diagnosis:
        scores_2THnr = torch.einsum(self._product("r"), queries, keys_2Hnrd)
        recall = exhaustive_recall(form, scores_2THnr, slots_THm)
        return Diagnosis(recall, form.singular_values())

    def _search(self, queries: Tensor, search: Tensor) -> Tensor:
        """Candidate rows and columns of every head, (2, T, H, c)."""
        scores_2THn = torch.einsum(self._product(""), queries, search)
        return top_candidates(scores_2THn, self.top_m, self.candidates)

    def _exact_scores(self, queries: Tensor, keys_2Hnrd: Tensor, index_2THc: Tensor) -> Tensor:
        """S_row and S_col of the candidates, (2, T, H, c, r), fp32 at least, differentiable."""
        _, num_heads, num_keys, rank, width = keys_2Hnrd.shape
        index_2THcr = index_2THc[..., None].expand(*index_2THc.shape, rank)
        count = {"s": 2, "h": num_heads, "r": rank}
        shape = {"s": (2, 1, 1, 1, 1), "h": (1, 1, num_heads, 1, 1), "r": (1, 1, 1, 1, rank)}
        coordinate = {
            letter: torch.arange(count[letter], device=queries.device).view(shape[letter])
            for letter in "shr"
        }
        head = coordinate["s"] * num_heads + coordinate["h"]
        row = (head * num_keys + index_2THcr) * rank + coordinate["r"]
        group = torch.zeros_like(coordinate["s"])
        for letter in self.layout:  # which of the token's queries serves (side, head, rank)
            group = group * count[letter] + coordinate[letter]
        dots_TK = row_dots(
            queries.flatten(1, -2),
            keys_2Hnrd.view(-1, width),
            row.transpose(0, 1).flatten(1),
            group.expand_as(row).transpose(0, 1).flatten(1),
            self.kernel,
        )
        return dots_TK.view(-1, 2, *index_2THcr.shape[2:]).transpose(0, 1)
