"""How pairs of row and column are scored: product keys, or Tucker form with several cores.

*Product keys* (paper eq. 2-3; Lample et al., 2019) add the row's and the column's score. The
*Tucker form* with multi-core scoring (eq. 5-10 and 16) is score_i(row, col) = S_row^T C_i S_col for
each of the h cores; their sum, the form of C = sum C_i, decides the selection. Candidates are the
top of S_row.u and S_col.v, with u, v the leading singular vectors of C (eq. 6-9).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ultramem_ds.config.schema import MemoryConfig
from ultramem_ds.model.roles import tag

# H heads, r Tucker rank, h cores. A leading 2 is the side: rows, then columns.


class ScoreForm(NamedTuple):
    """The scoring of one forward pass; plain tensors, so usable outside the module's forward."""

    core_hHrr: Tensor | None  # differentiable; None for product keys
    directions_2Hr: Tensor  # u and v, no gradient: candidates are ranked by their scores along them
    aux_loss: Tensor | float = 0.0  # eq. 12 before alpha, 0-dim; 0 outside training

    def singular_values(self) -> Tensor:
        """Singular values (r,) of the summed core, mean over heads, no gradient; else empty."""
        if self.core_hHrr is None:
            return self.directions_2Hr.new_empty(0)
        return torch.linalg.svdvals(self.core_hHrr.detach().sum(0)).mean(0)


class ProductKey(nn.Module):
    """Additive scores, on which the two-stage top-m is exact; no parameters, no loss."""

    directions: Tensor

    def __init__(self, memory: MemoryConfig) -> None:
        super().__init__()
        self.register_buffer("directions", torch.ones(2, memory.num_heads, 1))

    def mark_stale(self) -> None:
        """Nothing is cached."""

    def forward(self) -> ScoreForm:
        """Bind the directions."""
        return ScoreForm(None, self.directions)


class TuckerCore(nn.Module):
    """Owns the h cores per head and the leading singular vectors of their sum.

    The vectors are recomputed inside ``forward`` whenever they are stale: at the first forward,
    after ``mark_stale`` (called once per optimizer step), after an in-place write to the cores and
    after a load. The SVD is done in float64 on the CPU, so that every rank gets the same bits; the
    joint sign of (u, v), which chooses the quadrant that the candidate search sees, continues the
    previous one, or makes the largest entry of (u, v) positive where there is none.
    """

    directions: Tensor

    def __init__(self, memory: MemoryConfig) -> None:
        super().__init__()
        heads, rank = memory.num_heads, memory.tucker_rank
        self.core = nn.Parameter(torch.empty(memory.num_cores, heads, rank, rank))
        tag(self.core, role="core", init="memory_core")
        # Rows u and v per head; all zero = never computed.
        self.register_buffer("directions", torch.zeros(2, heads, rank))
        self.margin = memory.aux_loss_margin
        self._current: int | None = None  # of the cores that ``directions`` belongs to
        self.register_load_state_dict_post_hook(lambda module, _: module.mark_stale())

    def mark_stale(self) -> None:
        """The cores changed: recompute the singular vectors at the next forward."""
        self._current = None

    def keep_directions(self) -> None:
        """Take ``directions`` as they are for the current cores (recorded vectors)."""
        self._current = self._core_version()

    def _core_version(self) -> int:
        return 0 if self.core.is_inference() else self.core._version

    def forward(self) -> ScoreForm:
        """Bind the current cores (fp32 at least), refreshing the singular vectors if stale."""
        # A copy: under ZeRO-3 the parameter itself is released when this forward returns.
        core_hHrr = self.core.clone()
        core_hHrr = core_hHrr.to(torch.promote_types(core_hHrr.dtype, torch.float32))
        total_Hrr = core_hHrr.sum(0)
        if self._current != self._core_version() or self.directions.dtype != total_Hrr.dtype:
            previous = self.directions.double().cpu()
            fresh = leading_singular_vectors(total_Hrr.detach().double().cpu(), previous)
            self.directions = fresh.to(total_Hrr.device, total_Hrr.dtype)
            self._current = self._core_version()
        aux_loss: Tensor | float = 0.0
        if self.training:
            aux_loss = tucker_aux_loss(total_Hrr, self.margin)
        return ScoreForm(core_hHrr, self.directions, aux_loss)


def tucker_aux_loss(core_Hrr: Tensor, margin: float) -> Tensor:
    """Penalise the non-leading singular values that exceed a margin, mean over heads.

    ``1 / (r - 1) * sum_{i >= 2} max(0, sigma_i - margin)^2`` per head; the caller applies alpha.

    Args:
        core_Hrr: Sum of the cores per head, fp32 or fp64.
        margin: tau of eq. 12.

    Returns:
        0-dim loss with its graph attached; 0 for r = 1.
    """
    rank = core_Hrr.shape[-1]
    if rank == 1:
        return core_Hrr.new_zeros(())
    excess = (torch.linalg.svdvals(core_Hrr)[:, 1:] - margin).clamp(min=0.0)
    return excess.square().sum(-1).mean() / (rank - 1)


def leading_singular_vectors(core_Hrr: Tensor, previous_2Hr: Tensor) -> Tensor:
    """Leading left and right singular vectors per head, sign kept continuous.

    Args:
        core_Hrr: Matrices.
        previous_2Hr: Vectors whose joint sign is continued; zeros where there are none.

    Returns:
        (2, H, r): u, then v, of unit length.
    """
    left, _, right_t = torch.linalg.svd(core_Hrr)
    pair_2Hr = torch.stack([left[:, :, 0], right_t[:, 0, :]])
    by_head_Hx = pair_2Hr.transpose(0, 1).flatten(1)
    continuity_H = (pair_2Hr * previous_2Hr).sum((0, 2))
    largest_H = by_head_Hx.gather(1, by_head_Hx.abs().argmax(1, keepdim=True))[:, 0]
    reference_H = torch.where(continuity_H == 0, largest_H, continuity_H)
    sign_H = torch.where(reference_H < 0, -1.0, 1.0).to(pair_2Hr.dtype)
    return pair_2Hr * sign_H[None, :, None]
