"""Dot products of queries with chosen keys: the lookup kernels used the other way round.

``lookup_reduce`` sums weighted rows per (token, group); the gradient of its weights is the dot
product of each row with its bag. That gradient is the forward here, and the lookup is the gradient
for the queries, so that no (T, H, n, r) score tensor and no gathered copy of keys is ever needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ultramem_ds.kernels.base import Kernel, accumulation_dtype, rectangular_bags
from ultramem_ds.kernels.registry import resolve

# T tokens, G distinct queries of a token, K keys per token, R keys in all, d kdim.


class _RowDots(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries_TGd: Tensor,
        keys_Rd: Tensor,
        rows_TK: Tensor,
        groups_TK: Tensor,
        kernel: Kernel,
    ) -> Tensor:
        ctx.save_for_backward(queries_TGd, keys_Rd, rows_TK, groups_TK)
        ctx.kernel = kernel
        # The weights do not enter the gradient of the weights.
        unused_M1 = queries_TGd.new_zeros((1, 1), dtype=accumulation_dtype(keys_Rd.dtype))
        return _dots(kernel, queries_TGd, keys_Rd, rows_TK, groups_TK, unused_M1, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TK: Tensor) -> tuple[Tensor | None, ...]:
        queries_TGd, keys_Rd, rows_TK, groups_TK = ctx.saved_tensors
        kernel: Kernel = ctx.kernel
        weights_TK1 = grad_TK.contiguous()[..., None]
        grad_queries = grad_keys = None
        if ctx.needs_input_grad[0]:
            num_groups = queries_TGd.shape[1]
            grad_queries = kernel.lookup(keys_Rd, rows_TK, groups_TK, weights_TK1, num_groups)
        if ctx.needs_input_grad[1]:
            grad_keys = torch.zeros_like(keys_Rd, dtype=weights_TK1.dtype)
            weights_M1 = weights_TK1.view(-1, 1)
            _dots(kernel, queries_TGd, keys_Rd, rows_TK, groups_TK, weights_M1, grad_keys)
            grad_keys = grad_keys.to(keys_Rd.dtype)
        return grad_queries, grad_keys, None, None, None


def _dots(
    kernel: Kernel,
    queries_TGd: Tensor,
    keys_Rd: Tensor,
    rows_TK: Tensor,
    groups_TK: Tensor,
    weights_M1: Tensor,
    grad_keys_Rd: Tensor | None,
) -> Tensor:
    bags_M = rectangular_bags(groups_TK, queries_TGd.shape[1])
    flat_Bd = queries_TGd.flatten(0, 1).contiguous()
    if grad_keys_Rd is None:
        weights_M1 = weights_M1.expand(bags_M.numel(), 1)
    dots_M1 = kernel.backward(flat_Bd, keys_Rd, rows_TK.flatten(), bags_M, weights_M1, grad_keys_Rd)
    return dots_M1.view(rows_TK.shape)


def row_dots(
    queries_TGd: Tensor, keys_Rd: Tensor, rows_TK: Tensor, groups_TK: Tensor, kernel: str = "auto"
) -> Tensor:
    """``out[t, k] = queries[t, groups[t, k]] . keys[rows[t, k]]``; differentiable in both.

    Args:
        queries_TGd: Queries.
        keys_Rd: Keys, contiguous, of the queries' dtype.
        rows_TK: Key of each product, int64 in [0, R).
        groups_TK: Query of each product, int64 in [0, G).
        kernel: Name for ``kernels.registry``.

    Returns:
        (T, K) in the accumulation dtype: fp32, or fp64 for fp64 keys.
    """
    chosen = resolve(kernel, keys_Rd.device)
    dots_TK: Tensor = _RowDots.apply(
        queries_TGd, keys_Rd, rows_TK.contiguous(), groups_TK.contiguous(), chosen
    )
    return dots_TK
