"""Product-key scores: row score + column score (paper eq. 2-3; Lample et al., 2019)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ultramem_ds.config.schema import MemoryConfig

# T tokens, H heads, m pairs, c candidates per side, n keys per side; rank and cores are 1.


class ProductKeyForm(NamedTuple):
    """Additive grid scores; the two-stage top-m on them is exact."""

    directions_2Hr: Tensor  # ones: candidates are ranked by their own scores
    aux_loss: Tensor | float = 0.0  # there is no core to regularise

    def singular_values(self) -> Tensor:
        """None: an empty tensor."""
        return self.directions_2Hr.new_empty(0)

    def grid(self, row_THcr: Tensor, col_THcr: Tensor) -> Tensor:
        """Total scores of all pairs of candidates, (T, H, c, c)."""
        return row_THcr + col_THcr.transpose(-1, -2)

    def pair_scores(self, row_THmr: Tensor, col_THmr: Tensor) -> Tensor:
        """Scores of matched pairs, (T, H, m, 1)."""
        return row_THmr + col_THmr


class ProductKey(nn.Module):
    """The parameterless counterpart of ``TuckerCore``."""

    directions: Tensor

    def __init__(self, memory: MemoryConfig) -> None:
        super().__init__()
        self.register_buffer("directions", torch.ones(2, memory.num_heads, 1))

    def mark_stale(self) -> None:
        """Nothing is cached."""

    def forward(self) -> ProductKeyForm:
        """Bind the directions."""
        return ProductKeyForm(self.directions)
