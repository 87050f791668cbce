"""Two-stage retrieval of the top-m virtual slots per head (paper sections 3.1 and 3.2).

One batched product searches the keys of all heads on both sides; the top candidates of each side
span a small grid, whose exact top-m is the selection. What differs between product keys and TDQKR
(which directions are searched, how pairs are scored) is a ``scores.ScoreForm``.

The selection carries no gradient. The scores of the selected pairs do: with respect to the queries,
the keys and the cores. Candidates are ranked in the compute dtype, their grid in fp32 at least.
The two stages are one operator of ``kernels``. Each kernel breaks ties in its own way: the same
answer for the same scores, whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ultramem_ds.config.memory import MemoryConfig
from ultramem_ds.config.schema import ModelConfig
from ultramem_ds.kernels import resolve
from ultramem_ds.kernels.pairs import grid_scores
from ultramem_ds.model.memory.keys import ProductKeys
from ultramem_ds.model.memory.query import LAYOUTS, QueryEncoder, query_groups
from ultramem_ds.model.memory.scores import ProductKey, ScoreForm, TuckerCore

# T tokens, H heads, r Tucker rank, h cores, n keys per side, m top-m, c candidates per side,
# K = H*m rows per token, d kdim. A leading 2 is the side.

# Queries of some tokens by layout, search keys -> candidate scores (2, T, H, n).
SearchProduct: TypeAlias = Callable[[Tensor, Tensor], Tensor]
# Form, queries, keys (2, H, n, r, d) and search keys -> slots (T, H, m), scores (T, H, m, h).
Select: TypeAlias = Callable[[ScoreForm, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Diagnosis(NamedTuple):
    """What training-state statistics want to know of a retrieval; no gradients."""

    recall: Tensor  # 0-dim, see ``exhaustive_recall``
    singular_values_r: Tensor | None  # see ``ScoreForm``


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


class Retrieval(nn.Module):
    """Queries, keys and scores of memory layer ``layer``: (B, S, D) -> ``Selection``."""

    def __init__(self, model: ModelConfig, memory: MemoryConfig, layer: int = 0) -> None:
        super().__init__()
        self.query = QueryEncoder(model, memory, layer)
        self.form = TuckerCore(memory) if memory.retrieval == "tdqkr" else ProductKey(memory)
        self.keys = ProductKeys(memory, model.norm_eps)
        self.layout = LAYOUTS[memory.query]
        self.product: SearchProduct = self.search_product  # infer/ may put a faster one here
        self.select: Select = self.two_stage_select  # tests may watch or replace it
        self.compile_pairs = memory.compile
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
        doc_boundaries_BS: Tensor | None = None,
        conv_state: Tensor | None = None,
        recall_tokens: int = 0,
    ) -> Selection:
        """Select and score.

        Args:
            x_BSD: Hidden states.
            doc_boundaries_BS: True at a document's first token, where the convolution restarts.
            conv_state: ``Selection.conv_state`` of the tokens before, for decoding.
            recall_tokens: Diagnose the search on that many tokens, evenly spaced; 0 = do not.

        Returns:
            The selection of all T = B*S tokens.
        """
        form: ScoreForm = self.form()
        queries, conv_state = self.query(x_BSD, doc_boundaries_BS, conv_state)
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
        plain = queries.detach()
        return resolve(self.kernel, queries.device).select(
            lambda tokens: self.product(plain[tokens], search),
            queries.flatten(1, -2),
            self.groups(keys_2Hnrd),
            keys_2Hnrd,
            form.core_hHrr,
            self.top_m,
            self.candidates,
            compile_pairs=self.compile_pairs,
        )

    def groups(self, keys_2Hnrd: Tensor) -> Tensor:
        """Which of a token's queries meets the keys of a side, head and rank, (2, H, r)."""
        num_heads, rank = keys_2Hnrd.shape[1], keys_2Hnrd.shape[3]
        return query_groups(self.layout, num_heads, rank, keys_2Hnrd.device)

    def search_product(self, queries: Tensor, search: Tensor) -> Tensor:
        """See ``SearchProduct``."""
        return torch.einsum(self._equation(""), queries, search)

    def _equation(self, ranks: str) -> str:
        """Einsum of queries with keys; ``ranks`` is "r" to keep the ranks apart."""
        return f"t{self.layout}d,shnrd->sthn{ranks}"

    @torch.no_grad()
    def _diagnose(
        self, form: ScoreForm, queries: Tensor, keys_2Hnrd: Tensor, slots_THm: Tensor
    ) -> Diagnosis:
        scores_2THnr = torch.einsum(self._equation("r"), queries, keys_2Hnrd)
        recall = exhaustive_recall(form.core_hHrr, scores_2THnr, slots_THm)
        return Diagnosis(recall, form.singular_values_r)


def exhaustive_top(
    row_1nr: Tensor, col_1nr: Tensor, core_hHrr: Tensor | None, top_m: int
) -> Tensor:
    """Slots of the top-m of all n*n pairs, per head.

    The top-m lie in the m rows of largest maximum, so the second pass sees m*n pairs only.

    Args:
        row_1nr: One token's row scores, (H, n, r).
        col_1nr: Its column scores.
        core_hHrr: As of ``ScoreForm``.
        top_m: m.

    Returns:
        (H, m) slot ids row * n + col, best first.
    """
    grid_Hnn = grid_scores(core_hHrr, row_1nr[None], col_1nr[None])[0]
    num_keys = grid_Hnn.shape[-1]
    best_rows_Hm = grid_Hnn.amax(-1).topk(top_m).indices
    kept_Hmn = grid_Hnn.gather(1, best_rows_Hm[..., None].expand(-1, -1, num_keys))
    best_Hm = kept_Hmn.flatten(1).topk(top_m).indices
    return best_rows_Hm.gather(1, best_Hm // num_keys) * num_keys + best_Hm % num_keys


@torch.no_grad()
def exhaustive_recall(core_hHrr: Tensor | None, scores_2THnr: Tensor, slots_THm: Tensor) -> Tensor:
    """Share of the exhaustive top-m that a selection found.

    Args:
        core_hHrr: As of ``ScoreForm``.
        scores_2THnr: Row and column scores of all keys, of a few tokens.
        slots_THm: What the search selected for them.

    Returns:
        0-dim fp32 in [0, 1]; 1 for product keys but for ties. One token's n*n grid per head is held
        at a time.
    """
    wide = torch.promote_types(scores_2THnr.dtype, torch.float32)
    found = []
    for token, slots_Hm in enumerate(slots_THm):
        row_Hnr, col_Hnr = scores_2THnr[:, token].to(wide)
        exact_Hm = exhaustive_top(row_Hnr, col_Hnr, core_hHrr, slots_Hm.shape[-1])
        found.append((exact_Hm[..., None] == slots_Hm[:, None, :]).any(-1).float().mean())
    return torch.stack(found).mean()
