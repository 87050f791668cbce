"""Stand-in until the kernels branch lands: plain-torch lookup_reduce with its signature."""

from __future__ import annotations

import torch
from torch import Tensor


class _Accumulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_values, values, rows, grad):  # type: ignore[no-untyped-def]
        ctx.rows, ctx.grad = rows, grad
        return values.detach()[rows]

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        ctx.grad.index_add_(0, ctx.rows, grad_out.to(ctx.grad.dtype))
        return None, None, None, None


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
    """Weighted sum of value rows per (token, projector)."""
    num_tokens, per_token = rows_TK.shape
    flat = rows_TK.reshape(-1)
    if grad_values_RV is not None:
        anchor = torch.zeros((), requires_grad=True)
        picked = _Accumulate.apply(anchor, values_RV, flat, grad_values_RV)
    else:
        picked = values_RV[flat]
    h = scores_TKh.shape[-1]
    width = values_RV.shape[1]
    picked = picked.view(num_tokens, per_token, h, width // h)
    weighted = (picked * scores_TKh[..., None].to(picked.dtype)).reshape(-1, width)
    bag = torch.arange(num_tokens, device=flat.device)[:, None] * num_projectors + projectors_TK
    out = weighted.new_zeros(num_tokens * num_projectors, width)
    return out.index_add(0, bag.reshape(-1), weighted).view(num_tokens, num_projectors, width)
