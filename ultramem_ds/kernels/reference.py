"""The lookups' oracle: plain torch, one line per step of the definition, any device.

It gathers every looked-up row (``M * V`` elements), which is what the other implementations
exist to avoid.
"""

from __future__ import annotations

from torch import Tensor

from ultramem_ds.kernels.base import accumulation_dtype, ragged_bags, rectangular_bags
from ultramem_ds.kernels.plain import PlainKernel

# Letters: see kernels/base.py. C = V / h columns of one core's chunk.


def _by_core(rows_MV: Tensor, num_cores: int) -> Tensor:
    """View ``(M, V)`` as ``(M, h, C)``: value columns cut into h contiguous chunks."""
    return rows_MV.unflatten(1, (num_cores, rows_MV.shape[1] // num_cores))


class ReferenceKernel(PlainKernel):
    """Gather, multiply, ``add_rows_``; see :class:`ultramem_ds.kernels.base.Kernel`."""

    name = "reference"

    def _sum_into_bags(
        self, values_RV: Tensor, rows_M: Tensor, bags_M: Tensor, scores_Mh: Tensor, num_bags: int
    ) -> Tensor:
        gathered_MV = values_RV.index_select(0, rows_M).to(scores_Mh.dtype)
        weighted_MhC = _by_core(gathered_MV, scores_Mh.shape[1]) * scores_Mh[:, :, None]
        pooled_BV = weighted_MhC.new_zeros(num_bags, values_RV.shape[1])
        self.add_rows_(pooled_BV, bags_M, weighted_MhC.flatten(1))
        return pooled_BV.to(values_RV.dtype)

    def lookup(
        self,
        values_RV: Tensor,
        rows_TK: Tensor,
        projectors_TK: Tensor,
        scores_TKh: Tensor,
        num_projectors: int,
    ) -> Tensor:
        """See :class:`ultramem_ds.kernels.base.Kernel`."""
        num_bags = rows_TK.shape[0] * num_projectors
        bags_M = rectangular_bags(projectors_TK, num_projectors)
        pooled_BV = self._sum_into_bags(
            values_RV, rows_TK.flatten(), bags_M, scores_TKh.flatten(0, 1), num_bags
        )
        return pooled_BV.unflatten(0, (rows_TK.shape[0], num_projectors))

    def bags(
        self, values_RV: Tensor, rows_M: Tensor, offsets_B1: Tensor, scores_Mh: Tensor
    ) -> Tensor:
        """See :class:`ultramem_ds.kernels.base.Kernel`."""
        bags_M = ragged_bags(offsets_B1, rows_M.numel())
        return self._sum_into_bags(
            values_RV, rows_M, bags_M, scores_Mh, num_bags=offsets_B1.numel() - 1
        )

    def entry_dots(
        self, grad_BV: Tensor, values_RV: Tensor, rows_M: Tensor, bags_M: Tensor, num_cores: int
    ) -> Tensor:
        """See :class:`ultramem_ds.kernels.base.Kernel`."""
        dtype = accumulation_dtype(values_RV.dtype)
        grad_MhC = _by_core(grad_BV.index_select(0, bags_M).to(dtype), num_cores)
        gathered_MhC = _by_core(values_RV.index_select(0, rows_M).to(dtype), num_cores)
        return (grad_MhC * gathered_MhC).sum(-1)

    def backward(
        self,
        grad_BV: Tensor,
        values_RV: Tensor,
        rows_M: Tensor,
        bags_M: Tensor,
        scores_Mh: Tensor,
        grad_values_RV: Tensor,
    ) -> Tensor:
        """See :class:`ultramem_ds.kernels.base.Kernel`."""
        num_cores = scores_Mh.shape[1]
        grad_MhC = _by_core(grad_BV.index_select(0, bags_M).to(scores_Mh.dtype), num_cores)
        self.add_rows_(grad_values_RV, rows_M, (grad_MhC * scores_Mh[:, :, None]).flatten(1))
        return self.entry_dots(grad_BV, values_RV, rows_M, bags_M, num_cores)
