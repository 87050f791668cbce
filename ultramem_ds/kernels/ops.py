"""The public, differentiable operators: argument checks and autograd around a kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ultramem_ds.kernels import registry
from ultramem_ds.kernels.base import (
    Kernel,
    Layout,
    Ragged,
    Rectangular,
    accumulation_dtype,
)
from ultramem_ds.kernels.row_adam import AdamStep, check_row_adam

# Letters: see kernels/base.py.

VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class _LookupReduce(Function):
    """Pooling by a kernel; what the way back needs is the layout, the table and the scores."""

    @staticmethod
    def forward(
        ctx: Any,
        values_RV: Tensor,
        scores: Tensor,
        layout: Layout,
        kernel: Kernel,
        grad_values_RV: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(values_RV, scores)
        ctx.layout, ctx.kernel, ctx.grad_values_RV = layout, kernel, grad_values_RV
        scores_accumulated = scores.to(accumulation_dtype(values_RV.dtype))
        return layout.pool(kernel, values_RV, scores_accumulated)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_pooled: Tensor) -> tuple[Tensor | None, ...]:
        values_RV, scores = ctx.saved_tensors
        dtype = accumulation_dtype(values_RV.dtype)
        buffer_RV = ctx.grad_values_RV
        if ctx.needs_input_grad[0]:
            buffer_RV = torch.zeros_like(values_RV, dtype=dtype)
        rows_M, bags_M = ctx.layout.entries()
        grad_BV = grad_pooled.contiguous().view(-1, values_RV.shape[1])
        num_cores = scores.shape[-1]
        if buffer_RV is None:
            grad_scores_Mh = ctx.kernel.entry_dots(grad_BV, values_RV, rows_M, bags_M, num_cores)
        else:
            scores_Mh = scores.to(dtype).view(-1, num_cores)
            grad_scores_Mh = ctx.kernel.backward(
                grad_BV, values_RV, rows_M, bags_M, scores_Mh, buffer_RV
            )
        grad_values_RV = buffer_RV.to(values_RV.dtype) if ctx.needs_input_grad[0] else None
        return grad_values_RV, grad_scores_Mh.view_as(scores).to(scores.dtype), None, None, None


def _apply(
    values_RV: Tensor,
    scores: Tensor,
    layout: Layout,
    kernel_name: str,
    grad_values_RV: Tensor | None,
) -> Tensor:
    _check_table(values_RV, scores, grad_values_RV)
    kernel = registry.resolve(kernel_name, values_RV.device)
    scores = scores.contiguous()
    buffered = grad_values_RV is not None
    if not torch.is_grad_enabled() or not (
        buffered or values_RV.requires_grad or scores.requires_grad
    ):
        return layout.pool(kernel, values_RV, scores.to(accumulation_dtype(values_RV.dtype)))
    if buffered:
        values_RV = values_RV.detach()
        if not scores.requires_grad:
            # A node of the graph must exist, or the buffer would silently miss this lookup.
            scores = scores.detach().requires_grad_()
    pooled: Tensor = _LookupReduce.apply(values_RV, scores, layout, kernel, grad_values_RV)
    return pooled


def lookup_reduce(
    values_RV: Tensor,
    rows_TK: Tensor,
    projectors_TK: Tensor,
    scores_TKh: Tensor,
    num_projectors: int,
    *,
    grad_values_RV: Tensor | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Look up, weight and pool rows per (token, projector); differentiable.

    With the value columns cut into h contiguous chunks, ``out[t, p, chunk i]`` is the sum over
    the k with ``projectors[t, k] == p`` of ``scores[t, k, i] * values[rows[t, k], chunk i]``:
    implicit value expansion (UltraMem section 3.3) and multi-core scoring (section 3.4) in one
    pass over the rows.

    Args:
        values_RV: table, ``(R, V)`` contiguous, fp32, bf16 or fp64; h must divide V.
        rows_TK: row ids in ``[0, R)``, int64 or int32.
        projectors_TK: projector ids in ``[0, num_projectors)``, int64 or int32.
        scores_TKh: any floating dtype; weighting and sums are in fp32 (fp64 for an fp64 table).
        num_projectors: E.
        grad_values_RV: buffer of the table's shape in fp32 (fp64 for an fp64 table). If given,
            the backward adds the table's gradient to it in place, autograd sees none for
            ``values_RV``, and nothing of the table's size is allocated. If not, and
            ``values_RV`` requires a gradient, autograd gets a dense one.
        kernel: ``auto`` or a name of :data:`ultramem_ds.kernels.registry.NAMES`; the environment
            variable ``ULTRAMEM_KERNEL`` wins over it.

    Returns:
        ``(T, E, V)`` in the dtype of ``values_RV``.

    Raises:
        ValueError: shapes, dtypes or the kernel's name do not fit, or the kernel is unavailable.
        IndexError, RuntimeError: a row or projector id is out of range (checked on CPU).
    """
    layout = _rectangular(rows_TK, projectors_TK, scores_TKh, num_projectors)
    return _apply(values_RV, scores_TKh, layout, kernel, grad_values_RV)


def bag_reduce(
    values_RV: Tensor,
    rows_M: Tensor,
    offsets_B1: Tensor,
    scores_Mh: Tensor,
    *,
    grad_values_RV: Tensor | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Look up, weight and pool rows into ragged bags; differentiable.

    The ragged form of :func:`lookup_reduce`, where an owner of rows pools what each (token,
    projector) asks of it (owner-pooled sharding).

    Args:
        values_RV: as in :func:`lookup_reduce`.
        rows_M: row ids of all bags, one after the other.
        offsets_B1: int64 or int32; bag b holds entries ``offsets[b] : offsets[b + 1]``;
            ``offsets[0] == 0`` and ``offsets[B] == M``. Empty bags give zeros.
        scores_Mh: scores of the entries.
        grad_values_RV: as in :func:`lookup_reduce`.
        kernel: as in :func:`lookup_reduce`.

    Returns:
        ``(B, V)`` in the dtype of ``values_RV``.

    Raises:
        ValueError: shapes, dtypes or the kernel's name do not fit, or the kernel is unavailable.
        IndexError, RuntimeError: a row id is out of range (checked on CPU).
    """
    layout = _ragged(rows_M, offsets_B1, scores_Mh)
    return _apply(values_RV, scores_Mh, layout, kernel, grad_values_RV)


def row_adam_(
    rows_U: Tensor,
    grad_UV: Tensor,
    values_RV: Tensor,
    exp_avg_RV: Tensor,
    exp_avg_sq_RV: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
    kernel: str = "auto",
) -> None:
    """AdamW on the listed rows, in place; other rows and their moments are left alone.

    Semantics ("lazy" Adam) in :mod:`ultramem_ds.kernels.row_adam`.

    Args:
        rows_U: distinct row ids, ascending, int64.
        grad_UV: their gradients, fp32 (fp64 for an fp64 table).
        values_RV: table, updated; a bf16 table's update is computed in fp32 and rounded once.
        exp_avg_RV: first moments, dtype of ``grad_UV``, updated.
        exp_avg_sq_RV: second moments, dtype of ``grad_UV``, updated.
        step: number of this update, from 1; it sets the bias corrections of all rows.
        lr: learning rate of this step.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled; the listed rows shrink by ``lr * weight_decay``.
        grad_scale: factor on the gradients (clipping, averaging over ranks).
        kernel: as in :func:`lookup_reduce`.

    Raises:
        ValueError: shapes, dtypes, row ids or scalars do not fit.
    """
    check_row_adam(rows_U, grad_UV, values_RV, exp_avg_RV, exp_avg_sq_RV)
    scalars = AdamStep.at(
        step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, grad_scale=grad_scale
    )
    with torch.no_grad():
        registry.resolve(kernel, values_RV.device).row_adam_(
            rows_U, grad_UV, values_RV, exp_avg_RV, exp_avg_sq_RV, scalars
        )


def _rectangular(
    rows_TK: Tensor, projectors_TK: Tensor, scores_TKh: Tensor, num_projectors: int
) -> Rectangular:
    shape_TK = rows_TK.shape
    if len(shape_TK) != 2 or projectors_TK.shape != shape_TK:
        raise ValueError(
            f"rows {tuple(rows_TK.shape)} and projectors {tuple(projectors_TK.shape)} must both "
            "be (T, K)"
        )
    if scores_TKh.dim() != 3 or scores_TKh.shape[:2] != shape_TK:
        raise ValueError(
            f"scores {tuple(scores_TKh.shape)} must be (T, K, h) with rows {tuple(rows_TK.shape)}"
        )
    if num_projectors < 1:
        raise ValueError(f"num_projectors={num_projectors} must be at least 1")
    return Rectangular(_ids("rows", rows_TK), _ids("projectors", projectors_TK), num_projectors)


def _ragged(rows_M: Tensor, offsets_B1: Tensor, scores_Mh: Tensor) -> Ragged:
    if rows_M.dim() != 1 or offsets_B1.dim() != 1 or offsets_B1.numel() < 1:
        raise ValueError(
            f"rows {tuple(rows_M.shape)} must be (M,) and offsets {tuple(offsets_B1.shape)} "
            "(B + 1,)"
        )
    if scores_Mh.dim() != 2 or scores_Mh.shape[0] != rows_M.shape[0]:
        raise ValueError(
            f"scores {tuple(scores_Mh.shape)} must be (M, h) with rows {tuple(rows_M.shape)}"
        )
    return Ragged(_ids("rows", rows_M), _ids("offsets", offsets_B1))


def _ids(name: str, ids: Tensor) -> Tensor:
    if ids.dtype == torch.int64 and ids.is_contiguous():
        return ids
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} are {ids.dtype}; pass int64 or int32")
    return ids.to(torch.int64).contiguous()


def _check_table(values_RV: Tensor, scores: Tensor, grad_values_RV: Tensor | None) -> None:
    if values_RV.dim() != 2 or values_RV.dtype not in VALUE_DTYPES:
        raise ValueError(
            f"the table is {tuple(values_RV.shape)} {values_RV.dtype}; pass (R, V) in fp32, bf16 "
            "or fp64"
        )
    if not values_RV.is_contiguous():
        raise ValueError("the table is not contiguous; a copy of it would be made at every call")
    num_cores = scores.shape[-1]
    if num_cores < 1 or values_RV.shape[1] % num_cores != 0:
        raise ValueError(f"{num_cores} cores must divide the value width {values_RV.shape[1]}")
    if grad_values_RV is None:
        return
    dtype = accumulation_dtype(values_RV.dtype)
    if grad_values_RV.shape != values_RV.shape or grad_values_RV.dtype != dtype:
        raise ValueError(
            f"the gradient buffer is {tuple(grad_values_RV.shape)} {grad_values_RV.dtype}; it must "
            f"be {tuple(values_RV.shape)} {dtype}"
        )
    if not grad_values_RV.is_contiguous():
        raise ValueError("the gradient buffer is not contiguous")
