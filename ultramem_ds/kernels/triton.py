"""Triton kernels for CUDA, checked without one by Triton's interpreter (``TRITON_INTERPRET=1``).

Forward: a program holds one token's E bags for a tile of columns and walks the token's K rows,
each read once, in their order: no sort, no atomics. Backward: the scores' gradients are one dot
product per (entry, core), in the entries' own order; the table's gradient walks the entries
sorted by row, ``RUN`` of them per program and tile, so that a hot row does not hold up one program:
its parts are then joined in their order, which makes it deterministic. ``triton-atomic`` skips
that sort and adds with atomics instead: the order of additions, and the last bits, then vary.
Sums are in fp32 (fp64 for an fp64 table); ids are not checked against the table on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ultramem_ds.kernels.base import accumulation_dtype
from ultramem_ds.kernels.finding import FoundRows, RowFinder
from ultramem_ds.kernels.plain import PlainKernel
from ultramem_ds.kernels.row_adam import AdamStep
from ultramem_ds.kernels.tiles import Settings, gpu_name, power_of_two, settings
from ultramem_ds.kernels.triton_finding import DTYPES, find_rows
from ultramem_ds.kernels.triton_programs import (
    entry_dots_program,
    join_runs_program,
    pool_ragged_program,
    pool_rectangular_program,
    row_adam_program,
    row_backward_atomic_program,
    row_runs_program,
)

# Letters: see kernels/base.py. C = V / h columns of one core's chunk.

_ACCUMULATORS = 4096  # accumulators of one program: E bags times a tile of columns
RUN = 64  # sorted entries that one program of the backward walks
_TL_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def _tiles(program: str, columns: int, device: torch.device, limit: int = 1 << 30) -> Settings:
    """The table's settings, the tile no wider than what covers the columns, or than ``limit``."""
    covering = power_of_two(columns)
    chosen = settings(program, f"V{covering}", gpu_name(device))
    return {**chosen, "TILE_V": min(chosen["TILE_V"], covering, limit)}


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
        tile_E = power_of_two(num_projectors)
        limit = max(16, _ACCUMULATORS // tile_E)
        tiles = _tiles("pool_rectangular_program", width, values_RV.device, limit)
        if num_tokens > 0:
            with torch.cuda.device_of(values_RV):
                pool_rectangular_program[(num_tokens, triton.cdiv(width, tiles["TILE_V"]))](
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
                    **tiles,
                )
        return pooled_TEV

    def bags(
        self, values_RV: Tensor, rows_M: Tensor, offsets_B1: Tensor, scores_Mh: Tensor
    ) -> Tensor:
        """See :class:`ultramem_ds.kernels.base.Kernel`."""
        num_bags, width = offsets_B1.numel() - 1, values_RV.shape[1]
        pooled_BV = values_RV.new_empty(num_bags, width)
        tiles = _tiles("pool_ragged_program", width, values_RV.device)
        if num_bags > 0:
            with torch.cuda.device_of(values_RV):
                pool_ragged_program[(num_bags, triton.cdiv(width, tiles["TILE_V"]))](
                    values_RV,
                    rows_M,
                    offsets_B1,
                    scores_Mh,
                    pooled_BV,
                    width,
                    width // scores_Mh.shape[1],
                    scores_Mh.shape[1],
                    ACCUMULATE=_TL_DTYPES[scores_Mh.dtype],
                    **tiles,
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
        constants = {"ACCUMULATE": _TL_DTYPES[scores_Mh.dtype], "RUN": RUN}
        runs = _tiles("row_runs_program", width, grad_BV.device)
        joins = _tiles("join_runs_program", width, grad_BV.device)
        with torch.cuda.device_of(grad_BV):
            row_runs_program[(num_runs, triton.cdiv(width, runs["TILE_V"]))](
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
                **constants,
                **runs,
            )
            join_runs_program[(num_runs, triton.cdiv(width, joins["TILE_V"]))](
                sorted_M, partials, grad_values_RV, num_entries, width, **constants, **joins
            )

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
        tiles = _tiles("row_adam_program", width, values_RV.device)
        with torch.cuda.device_of(values_RV):
            row_adam_program[(num_listed, triton.cdiv(width, tiles["TILE_V"]))](
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
                **tiles,
            )

    def finds_rows(self, weight: Tensor) -> bool:
        """In three launches, in fp32 and bf16."""
        return weight.dtype in DTYPES

    def find_rows(
        self, finder: RowFinder, x_TD: Tensor, state_TCD: Tensor | None, begins_T: Tensor | None
    ) -> FoundRows:
        """See :class:`ultramem_ds.kernels.base.Kernel`."""
        return find_rows(finder, x_TD, state_TCD, begins_T)

    def entry_dots(
        self, grad_BV: Tensor, values_RV: Tensor, rows_M: Tensor, bags_M: Tensor, num_cores: int
    ) -> Tensor:
        """See :class:`ultramem_ds.kernels.base.Kernel`."""
        width, dtype = values_RV.shape[1], accumulation_dtype(values_RV.dtype)
        dots_Mh = values_RV.new_empty(rows_M.numel(), num_cores, dtype=dtype)
        tiles = _tiles("entry_dots_program", width // num_cores, values_RV.device)
        if rows_M.numel() > 0:
            with torch.cuda.device_of(values_RV):
                entry_dots_program[(rows_M.numel(), num_cores)](
                    values_RV,
                    rows_M,
                    bags_M,
                    grad_BV,
                    dots_Mh,
                    width,
                    width // num_cores,
                    num_cores,
                    ACCUMULATE=_TL_DTYPES[dtype],
                    **tiles,
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
        tiles = _tiles("row_backward_atomic_program", width, grad_BV.device)
        if rows_M.numel() > 0:
            with torch.cuda.device_of(grad_BV):
                row_backward_atomic_program[(rows_M.numel(), triton.cdiv(width, tiles["TILE_V"]))](
                    rows_M,
                    bags_M,
                    scores_Mh,
                    grad_BV,
                    grad_values_RV,
                    width,
                    width // num_cores,
                    num_cores,
                    ACCUMULATE=_TL_DTYPES[scores_Mh.dtype],
                    **tiles,
                )
