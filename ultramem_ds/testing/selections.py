"""Which slots memory layers select: recorded in one run, compared with or imposed on another.

A rounding difference between two numbers of ranks can exchange two slots whose scores are all but
equal. What follows differs by more than rounding, although neither run is wrong. Imposing the first
run's selections on the second takes that choice away: what then still differs is an error.

Letters: T tokens, S of one sequence, H heads, m slots, n keys per side, r Tucker rank, h cores. A
leading 2 is the side: rows, then columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from ultramem_ds.data.micro_batch import MicroBatch
from ultramem_ds.kernels import resolve
from ultramem_ds.kernels.dots import exact_scores
from ultramem_ds.kernels.pairs import grid_scores, pair_scores
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.model.memory.retrieval import Retrieval, Select
from ultramem_ds.model.memory.scores import ScoreForm

# (memory layer, global sample) -> slots (S, H, m), int64, best first.
Slots: TypeAlias = dict[tuple[int, int], Tensor]


@dataclass
class Flips:
    """Selections that differ between two runs.

    Attributes:
        searches: pairs of token and head that were compared.
        ties: for each that differs, how far from a tie it was: the relative distance of the scores
            that were exchanged, or of the last candidate taken on a side and the first not taken,
            whichever is least.
    """

    searches: int = 0
    ties: list[float] = field(default_factory=list)

    @property
    def widest(self) -> float:
        """The largest distance from a tie; 0 without flips."""
        return max(self.ties, default=0.0)


class SelectionLog:
    """Watches the selections of a model's memory layers; attach once, before its first forward.

    Args:
        model: of kind ultramem or pkm.
        imposed: selections to use instead of the model's own, of all samples that it will see;
            the own ones are compared with them.

    Attributes:
        slots: what was selected, by the model itself.
        flips: how that differs from ``imposed``.
    """

    def __init__(self, model: LanguageModel, imposed: Mapping[tuple[int, int], Tensor] | None):
        self.slots: Slots = {}
        self.flips = Flips()
        self._imposed = imposed
        self._samples: tuple[int, ...] = ()
        for index, layer in enumerate(model.memory_layers):
            layer.retrieval.select = self._selector(index, layer.retrieval)

    def batches(self, micro_batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """The same micro-batches; the log learns whose tokens the next forward sees."""
        for batch in micro_batches:
            self._samples = batch.sample_ids
            yield batch

    def _selector(self, index: int, retrieval: Retrieval) -> Select:
        own_select = retrieval.select

        def select(
            form: ScoreForm, queries: Tensor, keys_2Hnrd: Tensor, search: Tensor
        ) -> tuple[Tensor, Tensor]:
            with torch.set_grad_enabled(self._imposed is None and torch.is_grad_enabled()):
                slots_THm, scores_THmh = own_select(form, queries, keys_2Hnrd, search)
            for sample, mine_SHm in zip(self._samples, slots_THm.chunk(len(self._samples))):
                self.slots[index, sample] = mine_SHm.clone()
            if self._imposed is None:
                return slots_THm, scores_THmh
            imposed_THm = torch.cat([self._imposed[index, sample] for sample in self._samples])
            imposed_THmh = slot_scores(retrieval, form, queries, keys_2Hnrd, imposed_THm)
            with torch.no_grad():
                flipped_TH = (slots_THm.sort().values != imposed_THm.sort().values).any(-1)
                self.flips.searches += flipped_TH.numel()
                if flipped_TH.any():
                    totals = [x.detach().sum(-1)[flipped_TH] for x in (scores_THmh, imposed_THmh)]
                    sides = self._candidate_ties(retrieval, queries, search, flipped_TH)
                    ties_F = torch.minimum(_exchanged(*totals), sides)
                    self.flips.ties += ties_F.tolist()
            return imposed_THm, imposed_THmh

        return select

    def _candidate_ties(
        self, retrieval: Retrieval, queries: Tensor, search: Tensor, flipped_TH: Tensor
    ) -> Tensor:
        """Distance of the m-th and the next candidate, relative, least of both sides, (F,)."""
        tokens_T = flipped_TH.any(-1)
        scores_2THn = retrieval.search_product(queries[tokens_T], search)
        best_2THm = scores_2THn.topk(retrieval.top_m + 1, dim=-1).values
        gap_2TH = (best_2THm[..., -2] - best_2THm[..., -1]) / scores_2THn.abs().amax(-1)
        return gap_2TH.amin(0)[flipped_TH[tokens_T]]


def slot_scores(
    retrieval: Retrieval, form: ScoreForm, queries: Tensor, keys_2Hnrd: Tensor, slots_THm: Tensor
) -> Tensor:
    """Scores per core (T, H, m, h) of given slots, differentiable as those of selected ones."""
    index_2THm = torch.stack([slots_THm // retrieval.num_keys, slots_THm % retrieval.num_keys])
    scores_2THmr = _exact_scores(retrieval, queries, keys_2Hnrd, index_2THm)
    return pair_scores(form.core_hHrr, *scores_2THmr.unbind(0))


def _exact_scores(
    retrieval: Retrieval, queries: Tensor, keys_2Hnrd: Tensor, index_2THm: Tensor
) -> Tensor:
    """Row and column scores (2, T, H, m, r) of chosen keys."""
    kernel = resolve(retrieval.kernel, queries.device)
    groups_2Hr = retrieval.groups(keys_2Hnrd)
    return exact_scores(kernel, queries.flatten(1, -2), groups_2Hr, keys_2Hnrd, index_2THm)


def _exchanged(own_Fm: Tensor, imposed_Fm: Tensor) -> Tensor:
    """Largest relative distance of the two sets' scores, best with best and so on, (F,)."""
    distance_Fm = own_Fm.sort().values - imposed_Fm.sort().values
    return distance_Fm.abs().amax(-1) / own_Fm.abs().amax(-1)


def round_before_ranking(retrieval: Retrieval, bits: int) -> None:
    """Let a layer rank scores rounded to multiples of 2^-bits of a search's largest.

    Of equal scores the key, or pair of candidates, of the smallest number comes first. Scores that
    weight rows are not rounded.
    """

    def rounded(scores: Tensor) -> Tensor:
        step = 2.0 ** (scores.abs().amax(-1, keepdim=True).log2().ceil() - bits)
        return (scores / step).round()

    def best(scores: Tensor) -> Tensor:
        return rounded(scores).argsort(dim=-1, descending=True, stable=True)[..., :m]

    def select(
        form: ScoreForm, queries: Tensor, keys_2Hnrd: Tensor, search: Tensor
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            found_2THm = best(retrieval.search_product(queries, search))
            scores_2THmr = _exact_scores(retrieval, queries, keys_2Hnrd, found_2THm)
            pairs_THm = best(grid_scores(form.core_hHrr, *scores_2THmr.unbind(0)).flatten(-2))
            picks_2THm = torch.stack([pairs_THm // m, pairs_THm % m])
            rows_THm, cols_THm = found_2THm.gather(-1, picks_2THm).unbind(0)
            slots_THm = rows_THm * retrieval.num_keys + cols_THm
        return slots_THm, slot_scores(retrieval, form, queries, keys_2Hnrd, slots_THm)

    m = retrieval.top_m
    retrieval.select = select
