"""Small parts of a memory layer in native calls: ``csrc/small.cpp``.

Letters: B sequences, S tokens each, D hidden, k taps, n keys per side, N rows.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ultramem_ds.kernels.native import address


class _CausalConv(Function):
    """Without a state: what training runs."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BSD: Tensor,
        weight_kD: Tensor,
        doc_starts_BS: Tensor | None,
        library: ctypes.CDLL,
    ) -> Tensor:
        # A copy: under ZeRO-3 the parameter's data goes when its module's forward returns.
        ctx.save_for_backward(x_BSD, weight_kD.detach().clone(), doc_starts_BS)
        ctx.library = library
        return causal_conv_forward(library, x_BSD, weight_kD, doc_starts_BS, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSD: Tensor) -> tuple[Tensor | None, ...]:
        x_BSD, weight_kD, doc_starts_BS = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x_BSD), torch.empty_like(weight_kD)
        ctx.library.ultramem_conv_backward(
            address(grad_BSD.contiguous()),
            address(x_BSD),
            address(doc_starts_BS),
            address(weight_kD),
            *x_BSD.shape,
            len(weight_kD),
            address(grad_x),
            address(grad_weight),
        )
        return grad_x, grad_weight, None, None


def causal_conv_forward(
    library: ctypes.CDLL,
    x_BSD: Tensor,
    weight_kD: Tensor,
    doc_starts_BS: Tensor | None,
    state_BCD: Tensor | None,
) -> Tensor:
    """The convolution without a gradient; see :func:`causal_conv`."""
    out_BSD = torch.empty_like(x_BSD)
    library.ultramem_conv(
        address(x_BSD),
        address(state_BCD),
        address(doc_starts_BS),
        address(weight_kD),
        *x_BSD.shape,
        len(weight_kD),
        address(out_BSD),
    )
    return out_BSD


def causal_conv(
    library: ctypes.CDLL,
    x_BSD: Tensor,
    weight_kD: Tensor,
    doc_starts_BS: Tensor | None,
    state_BCD: Tensor | None,
) -> Tensor:
    """``model.memory.query.CausalConv`` in fp32; differentiable in inputs and weight.

    Args:
        library: of ``kernels.native``.
        x_BSD: inputs.
        weight_kD: taps, the token's own last.
        doc_starts_BS: bool, or None.
        state_BCD: the k - 1 inputs before, or None; it gets no gradient.
    """
    x_BSD, weight_kD = x_BSD.contiguous(), weight_kD.contiguous()
    starts_BS = None if doc_starts_BS is None else doc_starts_BS.contiguous()
    if state_BCD is None and torch.is_grad_enabled():
        out_BSD: Tensor = _CausalConv.apply(x_BSD, weight_kD, starts_BS, library)
        return out_BSD
    state_BCD = None if state_BCD is None else state_BCD.contiguous()
    return causal_conv_forward(library, x_BSD, weight_kD, starts_BS, state_BCD)


def shuffle_slots(library: ctypes.CDLL, slots: Tensor, tables: Tensor) -> Tensor:
    """``model.memory.expansion.BijectionShuffle``: int64 slots and round functions (rounds, n)."""
    slots = slots.contiguous()
    permuted = torch.empty_like(slots)
    library.ultramem_shuffle(
        address(slots), slots.numel(), address(tables), *tables.shape, address(permuted)
    )
    return permuted


def split_by_rows(library: ctypes.CDLL, slots: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """``slots % num_rows`` and ``slots // num_rows`` of int64 slots, none negative."""
    slots = slots.contiguous()
    rows, projectors = torch.empty_like(slots), torch.empty_like(slots)
    library.ultramem_split(
        address(slots), slots.numel(), num_rows, address(rows), address(projectors)
    )
    return rows, projectors
