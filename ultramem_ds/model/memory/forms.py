"""What retrieval asks of a way to score (row, column) pairs."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

# T tokens, H heads, r Tucker rank, h cores, m pairs, c candidates per side.


class ScoreForm(Protocol):
    """How candidates and pairs of row and column are scored; see ``tucker.TuckerForm``."""

    @property
    def directions_2Hr(self) -> Tensor:
        """Candidates of a side are ranked by their scores along these."""
        ...

    @property
    def aux_loss(self) -> Tensor | float:
        """Eq. 12 before alpha."""
        ...

    def singular_values(self) -> Tensor:
        """Singular values (r,) of the summed core, mean over heads; empty where there is none."""
        ...

    def grid(self, row_THcr: Tensor, col_THcr: Tensor) -> Tensor:
        """Total scores of all pairs of candidates, (T, H, c, c)."""
        ...

    def pair_scores(self, row_THmr: Tensor, col_THmr: Tensor) -> Tensor:
        """Scores of matched pairs for every core, (T, H, m, h)."""
        ...
