"""Auxiliary loss on the Tucker core (paper eq. 11-12)."""

from __future__ import annotations

import torch
from torch import Tensor

# H heads, r Tucker rank.


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
