"""Candidates of each side, and the scores of pairs of row and column, in torch operations.

Product keys add a row's and a column's score (paper eq. 2-3); a Tucker core C gives the form
``S_row^T C S_col`` (eq. 5-10), one per core of multi-core scoring (eq. 16), whose sum ranks pairs.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ultramem_ds.config.memory import Candidates

# T tokens, H heads, r Tucker rank, h cores, m pairs, c candidates per side, n keys per side. A
# leading 2 is the side: rows, then columns.


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


def grid_scores(core_hHrr: Tensor | None, row_THcr: Tensor, col_THcr: Tensor) -> Tensor:
    """Total scores of all pairs of candidates, (T, H, c, c); without cores, of product keys."""
    if core_hHrr is None:
        return row_THcr + col_THcr.transpose(-1, -2)
    return (row_THcr @ core_hHrr.sum(0)) @ col_THcr.transpose(-1, -2)


def pair_scores(core_hHrr: Tensor | None, row_THmr: Tensor, col_THmr: Tensor) -> Tensor:
    """Scores of matched pairs for every core, (T, H, m, h); h = 1 without cores."""
    if core_hHrr is None:
        return row_THmr + col_THmr
    return torch.einsum("thma,chab,thmb->thmc", row_THmr, core_hHrr, col_THmr)


def best_pairs(core_hHrr: Tensor | None, scores_2THcr: Tensor, top_m: int) -> tuple[Tensor, Tensor]:
    """Top-m of the grid that the candidates span, best first.

    Args:
        core_hHrr: as of :func:`grid_scores`.
        scores_2THcr: row and column scores of the candidates.
        top_m: m.

    Returns:
        Candidate numbers of the selected pairs, (2, T, H, m), no gradient; and the pairs'
        scores per core, (T, H, m, h).
    """
    num_candidates, rank = scores_2THcr.shape[-2:]
    with torch.no_grad():
        grid_THcc = grid_scores(core_hHrr, *scores_2THcr.unbind(0))
        pairs_THm = grid_THcc.flatten(-2).topk(top_m).indices
        picks_2THm = torch.stack([pairs_THm // num_candidates, pairs_THm % num_candidates])
    if scores_2THcr.requires_grad and scores_2THcr.device.type != "cpu":
        picked = pick_in_order(scores_2THcr, picks_2THm)
    else:
        picked = scores_2THcr.gather(-2, picks_2THm[..., None].expand(*picks_2THm.shape, rank))
    return picks_2THm, pair_scores(core_hHrr, *picked.unbind(0))


def pick_in_order(scores_2THcr: Tensor, picks_2THm: Tensor) -> Tensor:
    """The picked candidates' scores, (2, T, H, m, r), whose gradients add up in a fixed order.

    A candidate is in several pairs. On a GPU ``gather``'s backward adds their gradients in any
    order, that of an index sorts them first.
    """
    num_candidates = scores_2THcr.shape[-2]
    first_2TH1 = torch.arange(
        0, scores_2THcr.shape[:-1].numel(), num_candidates, device=picks_2THm.device
    ).view(*picks_2THm.shape[:-1], 1)
    return scores_2THcr.flatten(0, -2)[first_2TH1 + picks_2THm]


compiled_best_pairs = functools.cache(lambda: torch.compile(best_pairs))
