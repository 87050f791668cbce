"""Triton kernels for CUDA, checked without one by Triton's interpreter (``TRITON_INTERPRET=1``).

Forward: a program holds one token's E bags for a tile of columns and walks the token's K rows,
each read once, in their order: no sort, no atomics. Backward: the scores' gradients are one dot
product per (entry, core), in the entries' own order; the table's gradient walks the entries
sorted by row, one program per row and tile, which makes it deterministic. ``triton-atomic`` skips
that sort and adds with atomics instead: the order of additions, and the last bits, then vary.
Sums are in fp32 (fp64 for an fp64 table); ids are not checked against the table on a GPU.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (a @triton.jit function is Triton's language; its annotations have another meaning)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ultramem_ds.kernels.base import accumulation_dtype
from ultramem_ds.kernels.plain import PlainKernel

# Letters: see kernels/base.py. C = V / h columns of one core's chunk.

_ACCUMULATORS = 4096  # accumulators of one program: E bags times a tile of columns
_MAX_TILE = 512  # columns of a tile
_TL_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def _pool_rectangular(
    values, rows, projectors, scores, pooled,
    V, C, h, K, E,
    ACCUMULATE: tl.constexpr, TILE_E: tl.constexpr, TILE_V: tl.constexpr,
):  # fmt: skip
    """Program (t, tile): ``pooled[t, :, tile]``."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE_V + tl.arange(0, TILE_V)
    bags = tl.arange(0, TILE_E)
    in_row = columns < V
    sums = tl.zeros((TILE_E, TILE_V), dtype=ACCUMULATE)
    for k in range(K):
        entry = token * K + k
        row = tl.load(rows + entry)
        projector = tl.load(projectors + entry)
        score = tl.load(scores + entry * h + columns // C, mask=in_row, other=0.0)
        value = tl.load(values + row * V + columns, mask=in_row, other=0.0).to(ACCUMULATE)
        sums += tl.where(bags[:, None] == projector, (score * value)[None, :], 0.0)
    target = pooled + (token * E + bags[:, None]) * V + columns[None, :]
    tl.store(target, sums.to(pooled.dtype.element_ty), mask=(bags[:, None] < E) & in_row[None, :])


@triton.jit
def _pool_ragged(
    values, rows, offsets, scores, pooled,
    V, C, h,
    ACCUMULATE: tl.constexpr, TILE_V: tl.constexpr,
):  # fmt: skip
    """Program (b, tile): ``pooled[b, tile]``."""
    bag = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE_V + tl.arange(0, TILE_V)
    in_row = columns < V
    sums = tl.zeros((TILE_V,), dtype=ACCUMULATE)
    for entry in range(tl.load(offsets + bag), tl.load(offsets + bag + 1)):
        row = tl.load(rows + entry)
        score = tl.load(scores + entry * h + columns // C, mask=in_row, other=0.0)
        sums += score * tl.load(values + row * V + columns, mask=in_row, other=0.0).to(ACCUMULATE)
    tl.store(pooled + bag * V + columns, sums.to(pooled.dtype.element_ty), mask=in_row)


@triton.jit
def _entry_dots(
    values, rows, bags, grad, dots,
    V, C, h,
    ACCUMULATE: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    """Program (m, core): dot product of the entry's row and its bag's gradient on that core."""
    entry = tl.program_id(0).to(tl.int64)
    core = tl.program_id(1)
    row = tl.load(rows + entry)
    bag = tl.load(bags + entry)
    products = tl.zeros((TILE_C,), dtype=ACCUMULATE)
    for first in range(0, C, TILE_C):
        within = first + tl.arange(0, TILE_C)
        columns = core * C + within
        value = tl.load(values + row * V + columns, mask=within < C, other=0.0).to(ACCUMULATE)
        bag_grad = tl.load(grad + bag * V + columns, mask=within < C, other=0.0).to(ACCUMULATE)
        products += value * bag_grad
    tl.store(dots + entry * h + core, tl.sum(products, axis=0))


@triton.jit
def _row_backward(
    sorted_rows, ends, order, bags, scores, grad, grad_values,
    V, C, h,
    ACCUMULATE: tl.constexpr, TILE_V: tl.constexpr,
):  # fmt: skip
    """Program (j, tile): the row's gradient if sorted entry j is the first of its row."""
    first = tl.program_id(0).to(tl.int64)
    row = tl.load(sorted_rows + first)
    before = tl.load(sorted_rows + first - 1, mask=first > 0, other=-1)
    if row != before:
        columns = tl.program_id(1) * TILE_V + tl.arange(0, TILE_V)
        in_row = columns < V
        target = grad_values + row * V + columns
        sums = tl.load(target, mask=in_row, other=0.0)
        for j in range(first, tl.load(ends + first)):
            entry = tl.load(order + j)
            bag = tl.load(bags + entry)
            score = tl.load(scores + entry * h + columns // C, mask=in_row, other=0.0)
            sums += score * tl.load(grad + bag * V + columns, mask=in_row, other=0.0).to(ACCUMULATE)
        tl.store(target, sums, mask=in_row)


@triton.jit
def _row_backward_atomic(
    rows, bags, scores, grad, grad_values,
    V, C, h,
    ACCUMULATE: tl.constexpr, TILE_V: tl.constexpr,
):  # fmt: skip
    """Program (m, tile): add entry m's part to its row's gradient."""
    entry = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE_V + tl.arange(0, TILE_V)
    in_row = columns < V
    row = tl.load(rows + entry)
    bag = tl.load(bags + entry)
    score = tl.load(scores + entry * h + columns // C, mask=in_row, other=0.0)
    bag_grad = tl.load(grad + bag * V + columns, mask=in_row, other=0.0).to(ACCUMULATE)
    tl.atomic_add(grad_values + row * V + columns, score * bag_grad, mask=in_row)


def _tile(columns: int, limit: int = _MAX_TILE) -> int:
    """Return a power of two that covers ``columns``, or ``limit`` if that is less."""
    return min(triton.next_power_of_2(columns), limit)


class TritonKernel(PlainKernel):
    """Deterministic kernels; see :class:`ultramem_ds.kernels.base.Kernel`."""

    name = "triton"

    def lookup(
        self,
        values_RV: Tensor,
        rows_TK: Tensor,
        projectors_TK: Tensor,
        scores_TKh: Tensor,
        num_projectors: int,
    ) -> Tensor:
        """See :class:`ultramem_ds.kernels.base.Kernel`."""
        (num_tokens, num_entries), width = rows_TK.shape, values_RV.shape[1]
        pooled_TEV = values_RV.new_empty(num_tokens, num_projectors, width)
        tile_E = triton.next_power_of_2(num_projectors)
        tile_V = _tile(width, limit=max(16, min(_MAX_TILE, _ACCUMULATORS // tile_E)))
        if num_tokens > 0:
            with torch.cuda.device_of(values_RV):
                _pool_rectangular[(num_tokens, triton.cdiv(width, tile_V))](
                    values_RV,
                    rows_TK,
                    projectors_TK,
                    scores_TKh,
                    pooled_TEV,
                    width,
                    width // scores_TKh.shape[2],
                    scores_TKh.shape[2],
                    num_entries,
                    num_projectors,
                    ACCUMULATE=_TL_DTYPES[scores_TKh.dtype],
                    TILE_E=tile_E,
                    TILE_V=tile_V,
                )
        return pooled_TEV

    def bags(
        self, values_RV: Tensor, rows_M: Tensor, offsets_B1: Tensor, scores_Mh: Tensor
    ) -> Tensor:
        """See :class:`ultramem_ds.kernels.base.Kernel`."""
        num_bags, width = offsets_B1.numel() - 1, values_RV.shape[1]
        pooled_BV = values_RV.new_empty(num_bags, width)
        if num_bags > 0:
            with torch.cuda.device_of(values_RV):
                _pool_ragged[(num_bags, triton.cdiv(width, _tile(width)))](
                    values_RV,
                    rows_M,
                    offsets_B1,
                    scores_Mh,
                    pooled_BV,
                    width,
                    width // scores_Mh.shape[1],
                    scores_Mh.shape[1],
                    ACCUMULATE=_TL_DTYPES[scores_Mh.dtype],
                    TILE_V=_tile(width),
                )
        return pooled_BV

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
        self._add_to_table(grad_BV, rows_M, bags_M, scores_Mh, grad_values_RV)
        return self.entry_dots(grad_BV, values_RV, rows_M, bags_M, scores_Mh.shape[1])

    def _add_to_table(
        self,
        grad_BV: Tensor,
        rows_M: Tensor,
        bags_M: Tensor,
        scores_Mh: Tensor,
        grad_values_RV: Tensor,
    ) -> None:
        width, num_cores = grad_BV.shape[1], scores_Mh.shape[1]
        sorted_M, order_M = torch.sort(rows_M, stable=True)
        ends_M = torch.searchsorted(sorted_M, sorted_M, right=True)
        if sorted_M.numel() > 0:
            with torch.cuda.device_of(grad_BV):
                _row_backward[(sorted_M.numel(), triton.cdiv(width, _tile(width)))](
                    sorted_M,
                    ends_M,
                    order_M,
                    bags_M,
                    scores_Mh,
                    grad_BV,
                    grad_values_RV,
                    width,
                    width // num_cores,
                    num_cores,
                    ACCUMULATE=_TL_DTYPES[scores_Mh.dtype],
                    TILE_V=_tile(width),
                )

    def entry_dots(
        self, grad_BV: Tensor, values_RV: Tensor, rows_M: Tensor, bags_M: Tensor, num_cores: int
    ) -> Tensor:
        """See :class:`ultramem_ds.kernels.base.Kernel`."""
        width, dtype = values_RV.shape[1], accumulation_dtype(values_RV.dtype)
        dots_Mh = values_RV.new_empty(rows_M.numel(), num_cores, dtype=dtype)
        if rows_M.numel() > 0:
            with torch.cuda.device_of(values_RV):
                _entry_dots[(rows_M.numel(), num_cores)](
                    values_RV,
                    rows_M,
                    bags_M,
                    grad_BV,
                    dots_Mh,
                    width,
                    width // num_cores,
                    num_cores,
                    ACCUMULATE=_TL_DTYPES[dtype],
                    TILE_C=_tile(width // num_cores),
                )
        return dots_Mh


class TritonAtomicKernel(TritonKernel):
    """As :class:`TritonKernel`, but the table's gradient is added with atomics, unsorted."""

    name = "triton-atomic"

    def _add_to_table(
        self,
        grad_BV: Tensor,
        rows_M: Tensor,
        bags_M: Tensor,
        scores_Mh: Tensor,
        grad_values_RV: Tensor,
    ) -> None:
        width, num_cores = grad_BV.shape[1], scores_Mh.shape[1]
        if rows_M.numel() > 0:
            with torch.cuda.device_of(grad_BV):
                _row_backward_atomic[(rows_M.numel(), triton.cdiv(width, _tile(width)))](
                    rows_M,
                    bags_M,
                    scores_Mh,
                    grad_BV,
                    grad_values_RV,
                    width,
                    width // num_cores,
                    num_cores,
                    ACCUMULATE=_TL_DTYPES[scores_Mh.dtype],
                    TILE_V=_tile(width),
                )
