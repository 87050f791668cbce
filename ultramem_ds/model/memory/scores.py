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
    singular_values_r: Tensor | None = None  # of C, mean over heads, no gradient; None: not known
    aux_loss: Tensor | float = 0.0  # eq. 12 before alpha, 0-dim; 0 outside training


class ProductKey(nn.Module):
    """Additive scores, on which the two-stage top-m is exact; no parameters, no loss."""

    directions: Tensor

    def __init__(self, memory: MemoryConfig) -> None:
        super().__init__()
        self.register_buffer("directions", torch.ones(2, memory.num_heads, 1))

    @property
    def is_fresh(self) -> bool:
        """Whether ``directions`` are those of the current cores: there are none."""
        return True

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
    previous one, or makes the largest entry of (u, v) positive where there is none. The auxiliary
    loss takes its singular values from the same vectors, sigma_i = u_i^T C v_i, whose gradient
    with the vectors held fixed is the exact one: one decomposition per step, not per forward.
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
        self._current: int | None = None  # of the cores that the vectors belong to
        self._vectors_2Hrr: Tensor | None = None  # all left ones as rows, all right ones as rows
        self.register_load_state_dict_post_hook(lambda module, _: module.mark_stale())

    def mark_stale(self) -> None:
        """The cores changed: recompute the singular vectors at the next forward."""
        self._current = None

    def keep_directions(self) -> None:
        """Take ``directions`` as they are for the current cores (recorded vectors)."""
        self._decompose(self.core.detach().sum(0))

    def _decompose(self, total_Hrr: Tensor) -> Tensor:
        """All singular vectors of the current cores, float64, decomposed on the CPU."""
        vectors_2Hrr = singular_vectors(total_Hrr.double().cpu()).to(total_Hrr.device)
        self._vectors_2Hrr = vectors_2Hrr.to(total_Hrr.dtype)
        self._current = self._core_version()
        return vectors_2Hrr

    @property
    def is_fresh(self) -> bool:
        """Whether ``directions`` are known to be those of the current cores."""
        return self._current == self._core_version()

    def _core_version(self) -> int:
        return 0 if self.core.is_inference() else self.core._version

    def forward(self) -> ScoreForm:
        """Bind the current cores (fp32 at least), refreshing the singular vectors if stale."""
        # A copy: under ZeRO-3 the parameter itself is released when this forward returns.
        core_hHrr = self.core.clone()
        core_hHrr = core_hHrr.to(torch.promote_types(core_hHrr.dtype, torch.float32))
        total_Hrr = core_hHrr.sum(0)
        if not self.is_fresh or self.directions.dtype != total_Hrr.dtype:
            vectors_2Hrr = self._decompose(total_Hrr.detach())
            fresh = leading_pair(vectors_2Hrr, self.directions.to(vectors_2Hrr))
            self.directions = fresh.to(total_Hrr.dtype)
        if not self.training:
            return ScoreForm(core_hHrr, self.directions)
        assert self._vectors_2Hrr is not None
        left_Hrr, right_Hrr = self._vectors_2Hrr.to(total_Hrr)
        sigma_Hr = (left_Hrr @ total_Hrr * right_Hrr).sum(-1)
        aux_loss = tucker_aux_loss(sigma_Hr, self.margin)
        return ScoreForm(core_hHrr, self.directions, sigma_Hr.detach().mean(0), aux_loss)


def tucker_aux_loss(sigma_Hr: Tensor, margin: float) -> Tensor:
    """Penalise the non-leading singular values that exceed a margin, mean over heads (eq. 12).

    ``1 / (r - 1) * sum_{i >= 2} max(0, sigma_i - margin)^2`` per head; the caller applies alpha.

    Args:
        sigma_Hr: Singular values of the summed cores, descending.
        margin: tau of eq. 12.

    Returns:
        0-dim loss with its graph attached; 0 for r = 1.
    """
    rank = sigma_Hr.shape[-1]
    if rank == 1:
        return sigma_Hr.new_zeros(())
    excess = (sigma_Hr[:, 1:] - margin).clamp(min=0.0)
    return excess.square().sum(-1).mean() / (rank - 1)


def singular_vectors(core_Hrr: Tensor) -> Tensor:
    """Left, then right singular vectors as rows, (2, H, r, r), by descending singular value."""
    left_Hrr, _, right_Hrr = torch.linalg.svd(core_Hrr)
    return torch.stack([left_Hrr.transpose(1, 2), right_Hrr])


def leading_pair(vectors_2Hrr: Tensor, previous_2Hr: Tensor) -> Tensor:
    """Leading left and right singular vectors per head, sign kept continuous.

    Args:
        vectors_2Hrr: See ``singular_vectors``.
        previous_2Hr: Vectors whose joint sign is continued; zeros where there are none.

    Returns:
        (2, H, r): u, then v, of unit length.
    """
    pair_2Hr = vectors_2Hrr[:, :, 0]
    by_head_Hx = pair_2Hr.transpose(0, 1).flatten(1)
    continuity_H = (pair_2Hr * previous_2Hr).sum((0, 2))
    largest_H = by_head_Hx.gather(1, by_head_Hx.abs().argmax(1, keepdim=True))[:, 0]
    reference_H = torch.where(continuity_H == 0, largest_H, continuity_H)
    sign_H = torch.where(reference_H < 0, -1.0, 1.0).to(pair_2Hr.dtype)
    return pair_2Hr * sign_H[None, :, None]


def leading_singular_vectors(core_Hrr: Tensor, previous_2Hr: Tensor) -> Tensor:
    """``leading_pair`` of matrices."""
    return leading_pair(singular_vectors(core_Hrr), previous_2Hr)
