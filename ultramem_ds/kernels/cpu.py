"""The native CPU kernel: ``csrc/lookup.cpp`` behind :class:`ultramem_ds.kernels.base.Kernel`.

Forward: one pass over the entries, rows prefetched ahead, no sorting, no intermediate. Backward:
entries sorted by row once, then one pass in which each touched row's gradient is accumulated by
one thread (no atomics, reproducible for any number of threads) while its dot products give the
gradients of the scores.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ultramem_ds.kernels.base import RowGradients, accumulation_dtype
from ultramem_ds.kernels.hugepages import advise_huge_pages
from ultramem_ds.kernels.row_adam import AdamStep

# Letters: see kernels/base.py.

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}  # as in dispatch() of C++

# Argument types of each function after the dtype code; p array, i int64, f flag, d double.
_TYPES: dict[str, Any] = {"p": c_void_p, "i": c_int64, "f": c_int32, "d": c_double}
_SIGNATURES = {
    "ultramem_pool": ("piippppiiiiip", c_int64),
    "ultramem_score_backward": ("piipppiipip", c_int64),
    "ultramem_row_backward": ("piipppppiipipfp", c_int64),
    "ultramem_row_adam": ("piippppddddddd", None),
}


def load_library(path: Path) -> ctypes.CDLL:
    """Load the built extension and declare its functions.

    Raises:
        OSError: the file cannot be loaded.
    """
    library = ctypes.CDLL(str(path))
    for name, (arguments, result) in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = [c_int32, *(_TYPES[kind] for kind in arguments)]
        function.restype = result
    return library


class NativeKernel:
    """The C++ extension; see :class:`ultramem_ds.kernels.base.Kernel`."""

    name = "cpu"

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def _pool(
        self,
        values_RV: Tensor,
        rows_M: Tensor,
        offsets: Tensor | None,
        projectors: Tensor | None,
        scores_Mh: Tensor,
        num_groups: int,
        num_projectors: int,
    ) -> Tensor:
        num_rows, width = values_RV.shape
        num_entries = rows_M.numel()
        pooled = values_RV.new_empty(num_groups, num_projectors, width)
        bad = self.library.ultramem_pool(
            _DTYPE_CODES[values_RV.dtype],
            values_RV.data_ptr(),
            num_rows,
            width,
            rows_M.data_ptr(),
            offsets.data_ptr() if offsets is not None else None,
            projectors.data_ptr() if projectors is not None else None,
            scores_Mh.data_ptr(),
            scores_Mh.shape[-1],
            num_groups,
            num_entries // num_groups if num_groups else 0,
            num_projectors,
            num_entries,
            pooled.data_ptr(),
        )
        _raise_if_bad(bad, num_entries, num_rows)
        return pooled

    def lookup(
        self,
        values_RV: Tensor,
        rows_TK: Tensor,
        projectors_TK: Tensor,
        scores_TKh: Tensor,
        num_projectors: int,
    ) -> Tensor:
        """See :class:`ultramem_ds.kernels.base.Kernel`."""
        return self._pool(
            values_RV, rows_TK, None, projectors_TK, scores_TKh, rows_TK.shape[0], num_projectors
        )

    def bags(
        self, values_RV: Tensor, rows_M: Tensor, offsets_B1: Tensor, scores_Mh: Tensor
    ) -> Tensor:
        """See :class:`ultramem_ds.kernels.base.Kernel`."""
        num_bags = offsets_B1.numel() - 1
        return self._pool(values_RV, rows_M, offsets_B1, None, scores_Mh, num_bags, 1).squeeze(1)

    def backward(
        self,
        grad_BV: Tensor,
        values_RV: Tensor,
        rows_M: Tensor,
        bags_M: Tensor,
        scores_Mh: Tensor,
        grad_values_RV: Tensor | None,
    ) -> Tensor:
        """See :class:`ultramem_ds.kernels.base.Kernel`."""
        if grad_values_RV is None:
            return self._score_backward(grad_BV, values_RV, rows_M, bags_M, scores_Mh)
        sorted_M, order_M = torch.sort(rows_M, stable=True)
        return self._row_backward(
            grad_BV,
            values_RV,
            sorted_M,
            sorted_M,
            order_M,
            bags_M,
            scores_Mh,
            grad_values_RV,
            False,
        )

    def backward_rows(
        self, grad_BV: Tensor, values_RV: Tensor, rows_M: Tensor, bags_M: Tensor, scores_Mh: Tensor
    ) -> RowGradients:
        """See :class:`ultramem_ds.kernels.base.Kernel`."""
        sorted_M, order_M = torch.sort(rows_M, stable=True)
        rows_U, slots_M = torch.unique_consecutive(sorted_M, return_inverse=True)
        grad_UV = torch.empty(
            rows_U.numel(), values_RV.shape[1], dtype=accumulation_dtype(values_RV.dtype)
        )
        advise_huge_pages(grad_UV)  # fresh memory of up to M rows: 500 times fewer page faults
        grad_scores_Mh = self._row_backward(
            grad_BV, values_RV, sorted_M, slots_M, order_M, bags_M, scores_Mh, grad_UV, True
        )
        return RowGradients(rows_U, grad_UV, grad_scores_Mh)

    def _score_backward(
        self, grad_BV: Tensor, values_RV: Tensor, rows_M: Tensor, bags_M: Tensor, scores_Mh: Tensor
    ) -> Tensor:
        grad_scores_Mh = torch.empty_like(scores_Mh)
        bad = self.library.ultramem_score_backward(
            _DTYPE_CODES[values_RV.dtype],
            values_RV.data_ptr(),
            *values_RV.shape,
            rows_M.data_ptr(),
            bags_M.data_ptr(),
            scores_Mh.data_ptr(),
            scores_Mh.shape[1],
            rows_M.numel(),
            grad_BV.data_ptr(),
            grad_BV.shape[0],
            grad_scores_Mh.data_ptr(),
        )
        _raise_if_bad(bad, rows_M.numel(), values_RV.shape[0])
        return grad_scores_Mh

    def _row_backward(
        self,
        grad_BV: Tensor,
        values_RV: Tensor,
        sorted_M: Tensor,
        slots_M: Tensor,
        order_M: Tensor,
        bags_M: Tensor,
        scores_Mh: Tensor,
        grad_rows: Tensor,
        overwrite: bool,
    ) -> Tensor:
        """Put the gradient of sorted entry j's row into row ``slots_M[j]`` of ``grad_rows``."""
        grad_scores_Mh = torch.empty_like(scores_Mh)
        bad = self.library.ultramem_row_backward(
            _DTYPE_CODES[values_RV.dtype],
            values_RV.data_ptr(),
            *values_RV.shape,
            sorted_M.data_ptr(),
            slots_M.data_ptr(),
            order_M.data_ptr(),
            bags_M.data_ptr(),
            scores_Mh.data_ptr(),
            scores_Mh.shape[1],
            sorted_M.numel(),
            grad_BV.data_ptr(),
            grad_BV.shape[0],
            grad_rows.data_ptr(),
            overwrite,
            grad_scores_Mh.data_ptr(),
        )
        _raise_if_bad(bad, sorted_M.numel(), values_RV.shape[0])
        return grad_scores_Mh

    def row_adam_(
        self,
        rows_U: Tensor,
        grad_UV: Tensor,
        values_RV: Tensor,
        exp_avg_RV: Tensor,
        exp_avg_sq_RV: Tensor,
        step: AdamStep,
    ) -> None:
        """See :class:`ultramem_ds.kernels.base.Kernel`."""
        self.library.ultramem_row_adam(
            _DTYPE_CODES[values_RV.dtype],
            rows_U.data_ptr(),
            *grad_UV.shape,
            grad_UV.data_ptr(),
            values_RV.data_ptr(),
            exp_avg_RV.data_ptr(),
            exp_avg_sq_RV.data_ptr(),
            step.grad_scale,
            step.step_size,
            step.root_correction,
            step.decay,
            step.beta1,
            step.beta2,
            step.eps,
        )


def _raise_if_bad(bad: int, num_entries: int, num_rows: int) -> None:
    if bad >= num_entries:
        raise IndexError(f"the offsets of bag {bad - num_entries} are out of range")
    if bad >= 0:
        raise IndexError(
            f"the row id or projector id of entry {bad} is out of range ({num_rows} rows)"
        )
