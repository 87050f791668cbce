"""Product-key scores: row score + column score (paper eq. 2-3; Lample et al., 2019)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

# T tokens, H heads, m pairs, c candidates per side, n keys per side; rank and cores are 1.


@dataclass(frozen=True)
class ProductKeyForm:
    """Additive grid scores; the two-stage top-m on them is exact."""

    aux_loss: float = 0.0  # there is no core to regularise

    def candidate_scores(self, scores_2THnr: Tensor) -> Tensor:
        """The row and column scores themselves, (2, T, H, n)."""
        return scores_2THnr[..., 0]

    def grid(self, row_THcr: Tensor, col_THcr: Tensor) -> Tensor:
        """Total scores of all pairs of candidates, (T, H, c, c)."""
        return row_THcr + col_THcr.transpose(-1, -2)

    def pair_scores(self, row_THmr: Tensor, col_THmr: Tensor) -> Tensor:
        """Scores of matched pairs, (T, H, m, 1)."""
        return row_THmr + col_THmr


class ProductKey(nn.Module):
    """The parameterless counterpart of ``TuckerCore``."""

    def mark_stale(self) -> None:
        """Nothing is cached."""

    def forward(self) -> ProductKeyForm:
        """Bind nothing."""
        return ProductKeyForm()
