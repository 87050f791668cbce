"""Triton kernels for CUDA, checked without one by Triton's interpreter (``TRITON_INTERPRET=1``).

Forward: a program holds one token's E bags for a tile of columns and walks the token's K rows,
each read once, in their order: no sort, no atomics. Backward: the scores' gradients are one dot
product per (entry, core), in the entries' own order; the table's gradient walks the entries
sorted by row, ``RUN`` of them per program and tile, so that a hot row does not hold up one program:
its parts are then joined in their order, which makes it deterministic. ``triton-atomic`` skips
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
from ultramem_ds.kernels.row_adam import AdamStep

# Letters: see kernels/base.py. C = V / h columns of one core's chunk.

_ACCUMULATORS = 4096  # accumulators of one program: E bags times a tile of columns
_MAX_TILE = 512  # columns of a tile
RUN = 64  # sorted entries that one program of the backward walks
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
def _row_runs(
    sorted_rows, order, bags, scores, grad, grad_values, partials,
    M, V, C, h,
    ACCUMULATE: tl.constexpr, TILE_V: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Program (c, tile): sums of the rows of sorted entries ``c * RUN`` to ``(c + 1) * RUN``.

    A row whose entries all lie inside is added to the table. What a row has here of entries that
    began before goes to ``partials[2 c]``; what begins here and goes on, to ``partials[2 c + 1]``.
    """
    chunk = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE_V + tl.arange(0, TILE_V)
    in_row = columns < V
    begin = chunk * RUN
    end = tl.minimum(begin + RUN, M)
    row = tl.load(sorted_rows + begin)
    began_before = tl.load(sorted_rows + begin - 1, mask=begin > 0, other=-1) == row
    sums = tl.zeros((TILE_V,), dtype=ACCUMULATE)
    for j in range(begin, end):
        next_row = tl.load(sorted_rows + j)
        if next_row != row:
            if began_before:
                tl.store(partials + 2 * chunk * V + columns, sums, mask=in_row)
            else:
                target = grad_values + row * V + columns
                tl.store(target, tl.load(target, mask=in_row, other=0.0) + sums, mask=in_row)
            sums = tl.zeros((TILE_V,), dtype=ACCUMULATE)
            began_before = next_row == -1  # no
            row = next_row
        entry = tl.load(order + j)
        bag = tl.load(bags + entry)
        score = tl.load(scores + entry * h + columns // C, mask=in_row, other=0.0)
        sums += score * tl.load(grad + bag * V + columns, mask=in_row, other=0.0).to(ACCUMULATE)
    goes_on = tl.load(sorted_rows + end, mask=end < M, other=-1) == row
    if began_before:
        tl.store(partials + 2 * chunk * V + columns, sums, mask=in_row)
    else:
        if goes_on:
            tl.store(partials + (2 * chunk + 1) * V + columns, sums, mask=in_row)
        else:
            target = grad_values + row * V + columns
            tl.store(target, tl.load(target, mask=in_row, other=0.0) + sums, mask=in_row)


@triton.jit
def _join_runs(
    sorted_rows, partials, grad_values,
    M, V,
    ACCUMULATE: tl.constexpr, TILE_V: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Program (c, tile): add up, in order, the parts of the row that begins in c and goes on."""
    chunk = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE_V + tl.arange(0, TILE_V)
    in_row = columns < V
    begin = chunk * RUN
    end = tl.minimum(begin + RUN, M)
    row = tl.load(sorted_rows + end - 1)
    goes_on = tl.load(sorted_rows + end, mask=end < M, other=-1) == row
    began_before = tl.load(sorted_rows + begin - 1, mask=begin > 0, other=-1) == row
    if goes_on and not began_before:
        sums = tl.load(partials + (2 * chunk + 1) * V + columns, mask=in_row, other=0.0)
        part = chunk + 1
        while tl.load(sorted_rows + part * RUN, mask=part * RUN < M, other=-1) == row:
            sums += tl.load(partials + 2 * part * V + columns, mask=in_row, other=0.0)
            part += 1
        target = grad_values + row * V + columns
        tl.store(target, tl.load(target, mask=in_row, other=0.0) + sums, mask=in_row)


@triton.jit
def _row_adam(
    rows, grad, values, exp_avg, exp_avg_sq,
    V, grad_scale, step_size, root_correction, decay, beta1, beta2, eps,
    TILE_V: tl.constexpr,
):  # fmt: skip
    """Program (u, tile): AdamW on one row's tile; see ``row_adam.AdamStep``."""
    listed = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE_V + tl.arange(0, TILE_V)
    in_row = columns < V
    place = tl.load(rows + listed) * V + columns
    scaled = grad_scale * tl.load(grad + listed * V + columns, mask=in_row, other=0.0)
    avg = tl.load(exp_avg + place, mask=in_row, other=0.0)
    avg = beta1 * avg + (1.0 - beta1) * scaled
    avg_sq = tl.load(exp_avg_sq + place, mask=in_row, other=0.0)
    avg_sq = beta2 * avg_sq + (1.0 - beta2) * scaled * scaled
    update = step_size * avg / (tl.sqrt(avg_sq) / root_correction + eps)
    value = tl.load(values + place, mask=in_row, other=0.0).to(tl.float32)
    tl.store(exp_avg + place, avg, mask=in_row)
    tl.store(exp_avg_sq + place, avg_sq, mask=in_row)
    tl.store(values + place, (decay * value - update).to(values.dtype.element_ty), mask=in_row)


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
        num_entries, num_cores = scores_Mh.shape
        if num_entries == 0:
            return
        width = grad_BV.shape[1]
        sorted_M, order_M = torch.sort(rows_M, stable=True)
        num_runs = triton.cdiv(num_entries, RUN)
        partials = scores_Mh.new_empty(2 * num_runs, width)
        grid = (num_runs, triton.cdiv(width, _tile(width)))
        tiling = {"ACCUMULATE": _TL_DTYPES[scores_Mh.dtype], "TILE_V": _tile(width), "RUN": RUN}
        with torch.cuda.device_of(grad_BV):
            _row_runs[grid](
                sorted_M,
                order_M,
                bags_M,
                scores_Mh,
                grad_BV,
                grad_values_RV,
                partials,
                num_entries,
                width,
                width // num_cores,
                num_cores,
                **tiling,
            )
            _join_runs[grid](sorted_M, partials, grad_values_RV, num_entries, width, **tiling)

    def add_rows_(self, target_RV: Tensor, rows_M: Tensor, values_MV: Tensor) -> None:
        """See :class:`ultramem_ds.kernels.base.Kernel`: a lookup's backward, each bag one entry."""
        bags_M = torch.arange(rows_M.numel(), device=rows_M.device)
        ones_M1 = target_RV.new_ones(rows_M.numel(), 1)
        TritonKernel._add_to_table(self, values_MV.contiguous(), rows_M, bags_M, ones_M1, target_RV)

    def row_adam_(
        self,
        rows_U: Tensor,
        grad_UV: Tensor,
        values_RV: Tensor,
        exp_avg_RV: Tensor,
        exp_avg_sq_RV: Tensor,
        step: AdamStep,
    ) -> None:
        """One launch; an fp64 table's update is torch's, for launches take fp32 scalars."""
        if grad_UV.dtype != torch.float32:
            super().row_adam_(rows_U, grad_UV, values_RV, exp_avg_RV, exp_avg_sq_RV, step)
            return
        num_listed, width = grad_UV.shape
        if num_listed == 0:
            return
        with torch.cuda.device_of(values_RV):
            _row_adam[(num_listed, triton.cdiv(width, _tile(width)))](
                rows_U,
                grad_UV,
                values_RV,
                exp_avg_RV,
                exp_avg_sq_RV,
                width,
                step.grad_scale,
                step.step_size,
                step.root_correction,
                step.decay,
                step.beta1,
                step.beta2,
                step.eps,
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
