"""The lookup as torch's own ``embedding_bag``, forward and backward, on any device.

The table is viewed as ``(R * h, V / h)``: row ``r * h + i`` is core i's chunk of row r, so that
one bag per (bag, core) with per-sample weights is exactly the operator (no new kernel needed).
The table's gradient is the same operator transposed: sort the entries by row, and every distinct
row is a bag over rows of the output's gradient. Nothing of the table's size is allocated.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ultramem_ds.kernels.base import accumulation_dtype, rectangular_bags
from ultramem_ds.kernels.plain import PlainKernel

# Letters: see kernels/base.py.


def group_by_row(rows_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sort entries by row.

    Returns:
        ``(rows_U, starts_U1, order_M)``: the distinct rows in ascending order; entries
        ``order_M[starts_U1[u] : starts_U1[u + 1]]`` are those of ``rows_U[u]``, in their original
        order (the sort is stable, so sums are reproducible). All int64.
    """
    sorted_M, order_M = torch.sort(rows_M, stable=True)
    rows_U, counts_U = torch.unique_consecutive(sorted_M, return_counts=True)
    starts_U1 = F.pad(counts_U.cumsum(0), (1, 0))
    return rows_U, starts_U1, order_M


def group_by_projector(
    rows_TK: Tensor, projectors_TK: Tensor, scores_TKh: Tensor, num_projectors: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn the rectangular layout into the ragged one, one bag per (token, projector).

    Returns:
        ``(rows_M, offsets_B1, scores_Mh)`` with ``B = T * E``.
    """
    num_bags = rows_TK.shape[0] * num_projectors
    order_TK = torch.argsort(projectors_TK, dim=1, stable=True)
    rows_M = rows_TK.gather(1, order_TK).flatten()
    scores_Mh = scores_TKh.gather(1, order_TK[:, :, None].expand_as(scores_TKh)).flatten(0, 1)
    counts_B = torch.bincount(rectangular_bags(projectors_TK, num_projectors), minlength=num_bags)
    if counts_B.numel() != num_bags:
        raise ValueError(f"projectors_TK holds an id >= num_projectors={num_projectors}")
    return rows_M, F.pad(counts_B.cumsum(0), (1, 0)), scores_Mh


def split_cores(rows_M: Tensor, num_cores: int) -> Tensor:
    """Return ids of the ``(R * h, V / h)`` view, int64 ``(M, h)``, core i in column i."""
    return rows_M[:, None] * num_cores + torch.arange(num_cores, device=rows_M.device)


def bags_by_core(
    rows_M: Tensor, offsets_B1: Tensor, scores_Mh: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Lay entries out as bags ``(b, core)``: ids, offsets and weights for ``embedding_bag``."""
    num_entries, num_cores = scores_Mh.shape
    if num_cores == 1:
        return rows_M, offsets_B1, scores_Mh[:, 0]
    cores_h = torch.arange(num_cores, device=rows_M.device)
    counts_B, starts_B = offsets_B1.diff(), offsets_B1[:-1]
    starts_Bh = starts_B[:, None] * num_cores + counts_B[:, None] * cores_h
    # Entry j of bag b goes to starts_Bh[b, i] + j for core i.
    shift_Bh = starts_Bh - starts_B[:, None]
    shift_Mh = torch.repeat_interleave(shift_Bh, counts_B, dim=0, output_size=num_entries)
    position_Mh = shift_Mh + torch.arange(num_entries, device=rows_M.device)[:, None]
    ids = torch.empty(num_entries * num_cores, dtype=torch.int64, device=rows_M.device)
    weights = torch.empty_like(ids, dtype=scores_Mh.dtype)
    ids[position_Mh.flatten()] = split_cores(rows_M, num_cores).flatten()
    weights[position_Mh.flatten()] = scores_Mh.flatten()
    return ids, F.pad(starts_Bh.flatten(), (0, 1), value=num_entries * num_cores), weights


class EmbeddingBagKernel(PlainKernel):
    """Library kernels only; see :class:`ultramem_ds.kernels.base.Kernel`.

    ``embedding_bag`` wants weights in the table's dtype and would round the scores of a bf16
    table, so that such a table's touched rows are first gathered in fp32.
    """

    name = "embedding-bag"

    def lookup(
        self,
        values_RV: Tensor,
        rows_TK: Tensor,
        projectors_TK: Tensor,
        scores_TKh: Tensor,
        num_projectors: int,
    ) -> Tensor:
        """See :class:`ultramem_ds.kernels.base.Kernel`."""
        rows_M, offsets_B1, scores_Mh = group_by_projector(
            rows_TK, projectors_TK, scores_TKh, num_projectors
        )
        pooled_BV = self.bags(values_RV, rows_M, offsets_B1, scores_Mh)
        return pooled_BV.unflatten(0, (rows_TK.shape[0], num_projectors))

    def bags(
        self, values_RV: Tensor, rows_M: Tensor, offsets_B1: Tensor, scores_Mh: Tensor
    ) -> Tensor:
        """See :class:`ultramem_ds.kernels.base.Kernel`."""
        num_bags, num_cores = offsets_B1.numel() - 1, scores_Mh.shape[1]
        table_RV, rows_M = _in_accumulation_dtype(values_RV, rows_M)
        ids, offsets, weights = bags_by_core(rows_M, offsets_B1, scores_Mh)
        pooled = F.embedding_bag(
            ids,
            table_RV.view(-1, table_RV.shape[1] // num_cores),
            offsets,
            mode="sum",
            per_sample_weights=weights,
            include_last_offset=True,
        )
        return pooled.view(num_bags, values_RV.shape[1]).to(values_RV.dtype)

    def entry_dots(
        self, grad_BV: Tensor, values_RV: Tensor, rows_M: Tensor, bags_M: Tensor, num_cores: int
    ) -> Tensor:
        """See :class:`ultramem_ds.kernels.base.Kernel`."""
        table_RV, rows_M = _in_accumulation_dtype(values_RV, rows_M)
        width = table_RV.shape[1] // num_cores
        ids, bags = split_cores(rows_M, num_cores), split_cores(bags_M, num_cores)
        grad_scores = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad_BV.to(table_RV.dtype).view(-1, width),
            table_RV.view(-1, width),
            ids.flatten(),
            torch.arange(ids.numel(), device=ids.device),
            bags.flatten(),
            0,  # mode "sum"
        )
        return grad_scores.view(-1, num_cores)

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
        rows_U, starts_U1, order_M = group_by_row(rows_M)
        grad_UV = self.bags(
            grad_BV.to(scores_Mh.dtype), bags_M[order_M], starts_U1, scores_Mh[order_M]
        )
        grad_values_RV.index_add_(0, rows_U, grad_UV)
        return self.entry_dots(grad_BV, values_RV, rows_M, bags_M, scores_Mh.shape[1])


def _in_accumulation_dtype(values_RV: Tensor, rows_M: Tensor) -> tuple[Tensor, Tensor]:
    """Return a table of the accumulation dtype and the entries' rows in it."""
    dtype = accumulation_dtype(values_RV.dtype)
    if values_RV.dtype == dtype:
        return values_RV, rows_M
    return values_RV.index_select(0, rows_M).to(dtype), torch.arange(
        rows_M.numel(), device=rows_M.device
    )
