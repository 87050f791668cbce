"""Dot products of queries with chosen keys: a kernel's lookups used the other way round.

A lookup sums weighted rows per (token, group); the gradient of its weights is the dot product of
each row with its bag. That gradient is the forward here, and the lookup is the gradient for the
queries, so that no (T, H, n, r) score tensor and no gathered copy of keys is ever needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ultramem_ds.kernels.base import Kernel, rectangular_bags

# T tokens, G distinct queries of a token, K keys per token, R keys in all, d kdim. H heads, n keys
# per side, r Tucker rank, c chosen keys; a leading 2 is the side.


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
        flat_Bd, bags_M = _as_bags(queries_TGd, groups_TK)
        return kernel.entry_dots(flat_Bd, keys_Rd, rows_TK.flatten(), bags_M, 1).view_as(rows_TK)

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
            flat_Bd, bags_M = _as_bags(queries_TGd, groups_TK)
            kernel.backward(
                flat_Bd, keys_Rd, rows_TK.flatten(), bags_M, weights_TK1.view(-1, 1), grad_keys
            )
            grad_keys = grad_keys.to(keys_Rd.dtype)
        return grad_queries, grad_keys, None, None, None


def _as_bags(queries_TGd: Tensor, groups_TK: Tensor) -> tuple[Tensor, Tensor]:
    """A row per (token, query), and which of them each product takes."""
    bags_M = rectangular_bags(groups_TK, queries_TGd.shape[1])
    return queries_TGd.flatten(0, 1).contiguous(), bags_M


def row_dots(
    kernel: Kernel, queries_TGd: Tensor, keys_Rd: Tensor, rows_TK: Tensor, groups_TK: Tensor
) -> Tensor:
    """``out[t, k] = queries[t, groups[t, k]] . keys[rows[t, k]]``; differentiable in both.

    Args:
        kernel: does the products.
        queries_TGd: queries.
        keys_Rd: keys, contiguous, of the queries' dtype.
        rows_TK: key of each product, int64 in [0, R).
        groups_TK: query of each product, int64 in [0, G).

    Returns:
        (T, K) in the accumulation dtype: fp32, or fp64 for fp64 keys.
    """
    dots_TK: Tensor = _RowDots.apply(
        queries_TGd, keys_Rd, rows_TK.contiguous(), groups_TK.contiguous(), kernel
    )
    return dots_TK


def exact_scores(
    kernel: Kernel,
    queries_TGd: Tensor,
    groups_2Hr: Tensor,
    keys_2Hnrd: Tensor,
    index_2THc: Tensor,
) -> Tensor:
    """S_row and S_col of chosen keys, (2, T, H, c, r), fp32 at least, differentiable.

    Args:
        kernel: does the products.
        queries_TGd: queries.
        groups_2Hr: which of them meets the keys of a side, head and rank.
        keys_2Hnrd: all keys.
        index_2THc: the chosen ones of every side, token and head.
    """
    _, num_heads, num_keys, rank, width = keys_2Hnrd.shape
    index_2THcr = index_2THc[..., None].expand(*index_2THc.shape, rank)
    head = torch.arange(2 * num_heads, device=index_2THc.device).view(2, 1, num_heads, 1, 1)
    ranks = torch.arange(rank, device=index_2THc.device)
    row = (head * num_keys + index_2THcr) * rank + ranks
    group = groups_2Hr[:, None, :, None, :].expand_as(row)
    dots_TK = row_dots(
        kernel,
        queries_TGd,
        keys_2Hnrd.reshape(-1, width),
        row.transpose(0, 1).flatten(1),
        group.transpose(0, 1).flatten(1),
    )
    return dots_TK.view(-1, 2, *index_2THcr.shape[2:]).transpose(0, 1)
