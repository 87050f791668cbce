"""What every implementation of the lookup offers, and the two layouts its entries come in.

An *entry* is one looked-up row with its h scores. Entries are summed into *bags*: a bag is one
(token, projector) of the rectangular layout, or one CSR segment of the ragged layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ultramem_ds.kernels.row_adam import AdamStep

# T tokens, K entries per token, M entries in all (T * K when rectangular), E projectors, B bags,
# B1 = B + 1, R rows of the table on this rank, V value width, h cores, U distinct rows touched.


@dataclass(frozen=True)
class RowGradients:
    """The table's gradient, restricted to the rows that a backward touched.

    Attributes:
        rows_U: int64, distinct row ids in ascending order.
        grad_UV: their gradients in the accumulation dtype (fp32, or fp64 for an fp64 table).
        grad_scores: gradient of the scores, in the scores' shape, accumulation dtype.
    """

    rows_U: Tensor
    grad_UV: Tensor
    grad_scores: Tensor


class Kernel(Protocol):
    """One implementation of lookup, weighting and pooling, with its backward.

    Arguments have been checked by :mod:`ultramem_ds.kernels.ops`: ids are int64 and contiguous,
    scores are in the accumulation dtype, ``values_RV`` and ``grad_BV`` are contiguous and of one
    dtype. Results are in the dtype of ``values_RV``, gradients in the accumulation dtype.
    """

    name: str

    def lookup(
        self,
        values_RV: Tensor,
        rows_TK: Tensor,
        projectors_TK: Tensor,
        scores_TKh: Tensor,
        num_projectors: int,
    ) -> Tensor:
        """Pool the rectangular layout into ``(T, E, V)``."""
        ...

    def bags(
        self, values_RV: Tensor, rows_M: Tensor, offsets_B1: Tensor, scores_Mh: Tensor
    ) -> Tensor:
        """Pool the ragged layout into ``(B, V)``."""
        ...

    def backward(
        self,
        grad_BV: Tensor,
        values_RV: Tensor,
        rows_M: Tensor,
        bags_M: Tensor,
        scores_Mh: Tensor,
        grad_values_RV: Tensor | None,
    ) -> Tensor:
        """Return ``grad_scores_Mh``; add the table's gradient to ``grad_values_RV`` if given."""
        ...

    def backward_rows(
        self, grad_BV: Tensor, values_RV: Tensor, rows_M: Tensor, bags_M: Tensor, scores_Mh: Tensor
    ) -> RowGradients:
        """Return the gradients of the touched rows, and of the scores as ``(M, h)``."""
        ...

    def row_adam_(
        self,
        rows_U: Tensor,
        grad_UV: Tensor,
        values_RV: Tensor,
        exp_avg_RV: Tensor,
        exp_avg_sq_RV: Tensor,
        step: AdamStep,
    ) -> None:
        """Update rows of the table and of its moments in place (AdamW)."""
        ...


class Layout(Protocol):
    """Entries and the bags they are summed into."""

    def pool(self, kernel: Kernel, values_RV: Tensor, scores: Tensor) -> Tensor:
        """Run ``kernel`` forward; ``scores`` and the result have the layout's own shapes."""
        ...

    def entries(self) -> tuple[Tensor, Tensor]:
        """Return ``(rows_M, bags_M)``: the row and the bag of every entry."""
        ...


class Rectangular(NamedTuple):
    """K entries for each of T tokens; bag ``t * E + projector``."""

    rows_TK: Tensor
    projectors_TK: Tensor
    num_projectors: int

    def pool(self, kernel: Kernel, values_RV: Tensor, scores: Tensor) -> Tensor:
        """See :class:`Layout`."""
        return kernel.lookup(
            values_RV, self.rows_TK, self.projectors_TK, scores, self.num_projectors
        )

    def entries(self) -> tuple[Tensor, Tensor]:
        """See :class:`Layout`."""
        return self.rows_TK.flatten(), rectangular_bags(self.projectors_TK, self.num_projectors)


class Ragged(NamedTuple):
    """Entries ``offsets[b] : offsets[b + 1]`` form bag b; a bag may be empty."""

    rows_M: Tensor
    offsets_B1: Tensor

    def pool(self, kernel: Kernel, values_RV: Tensor, scores: Tensor) -> Tensor:
        """See :class:`Layout`."""
        return kernel.bags(values_RV, self.rows_M, self.offsets_B1, scores)

    def entries(self) -> tuple[Tensor, Tensor]:
        """See :class:`Layout`."""
        return self.rows_M, ragged_bags(self.offsets_B1, self.rows_M.numel())


def rectangular_bags(projectors_TK: Tensor, num_projectors: int) -> Tensor:
    """Return the bag ``t * E + projector`` of every entry, int64 ``(M,)``."""
    first_bag_T = torch.arange(projectors_TK.shape[0], device=projectors_TK.device)
    return (projectors_TK + first_bag_T[:, None] * num_projectors).flatten()


def ragged_bags(offsets_B1: Tensor, num_entries: int) -> Tensor:
    """Return the bag of every entry of a CSR layout, int64 ``(M,)``."""
    bags_B = torch.arange(offsets_B1.numel() - 1, device=offsets_B1.device)
    return torch.repeat_interleave(bags_B, offsets_B1.diff(), output_size=num_entries)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums and gradients of a table of ``dtype`` are kept in."""
    return torch.promote_types(dtype, torch.float32)
