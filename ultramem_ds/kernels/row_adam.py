"""AdamW on the rows a backward touched: time and traffic follow the batch, not the table.

The update is AdamW's (decoupled decay, bias corrections) applied to the given rows only. A row
not looked up in a step keeps its value and moments: its moments do not decay and it has no weight
decay meanwhile ("lazy" Adam). With a table that every step touches entirely the two coincide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Letters: see kernels/base.py.


@dataclass(frozen=True, kw_only=True)
class AdamStep:
    """AdamW's scalars at one step, bias corrections folded in.

    ``value = decay * value - step_size * avg / (sqrt(avg_sq) / root_correction + eps)`` with
    ``avg = beta1 * avg + (1 - beta1) * g``, ``avg_sq = beta2 * avg_sq + (1 - beta2) * g**2`` and
    ``g = grad_scale * grad``.
    """

    grad_scale: float
    step_size: float
    root_correction: float
    decay: float
    beta1: float
    beta2: float
    eps: float

    @classmethod
    def at(
        cls,
        step: int,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        grad_scale: float,
    ) -> AdamStep:
        """Return the scalars of the ``step``-th update (the first is 1).

        Raises:
            ValueError: ``step`` is below 1 or a beta is outside [0, 1).
        """
        beta1, beta2 = betas
        if step < 1:
            raise ValueError(f"step={step}: the first update is step 1")
        if not (0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0):
            raise ValueError(f"betas={betas} must be in [0, 1)")
        return cls(
            grad_scale=grad_scale,
            step_size=lr / (1.0 - beta1**step),
            root_correction=math.sqrt(1.0 - beta2**step),
            decay=1.0 - lr * weight_decay,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
        )


def check_row_adam(
    rows_U: Tensor,
    grad_UV: Tensor,
    values_RV: Tensor,
    exp_avg_RV: Tensor,
    exp_avg_sq_RV: Tensor,
) -> None:
    """Raise ValueError if shapes, dtypes or row ids do not fit together."""
    dtype = torch.promote_types(values_RV.dtype, torch.float32)
    if grad_UV.shape != (rows_U.numel(), values_RV.shape[1]) or grad_UV.dtype != dtype:
        raise ValueError(
            f"gradients {tuple(grad_UV.shape)} {grad_UV.dtype} must be "
            f"({rows_U.numel()}, {values_RV.shape[1]}) {dtype}"
        )
    for name, state_RV in (("exp_avg", exp_avg_RV), ("exp_avg_sq", exp_avg_sq_RV)):
        if state_RV.shape != values_RV.shape or state_RV.dtype != dtype:
            raise ValueError(
                f"{name} {tuple(state_RV.shape)} {state_RV.dtype} must be "
                f"{tuple(values_RV.shape)} {dtype}"
            )
    contiguous = (grad_UV, values_RV, exp_avg_RV, exp_avg_sq_RV)
    if not all(tensor.is_contiguous() for tensor in contiguous):
        raise ValueError("gradients, table and moments must be contiguous")
    if rows_U.dtype != torch.int64 or not rows_U.is_contiguous():
        raise ValueError(f"rows are {rows_U.dtype}; pass contiguous int64")
    # On a GPU the answer would cost a synchronisation; indexing checks its bounds there.
    if rows_U.device.type == "cpu" and not _ascending_below(rows_U, values_RV.shape[0]):
        raise ValueError(f"rows must be distinct, ascending and in [0, {values_RV.shape[0]})")


def _ascending_below(rows_U: Tensor, num_rows: int) -> bool:
    if rows_U.numel() == 0:
        return True
    in_range = rows_U[0] >= 0 and rows_U[-1] < num_rows
    return bool(in_range and (rows_U.diff() > 0).all())
