"""Differentiable native calls: what :class:`ultramem_ds.kernels.cpu.NativeKernel` trains with.

``csrc/small.cpp`` (the query's convolution) and ``csrc/select.cpp`` (the two-stage selection).
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ultramem_ds.kernels.base import Search
from ultramem_ds.kernels.native import address

# Letters: see kernels/base.py.

TOKENS_PER_SEARCH = 256  # their scores are read back from the cache they were written to


class _Saved(NamedTuple):
    """What the way back needs."""

    queries_TGd: Tensor
    groups_2Hr: Tensor
    keys_2Hnrd: Tensor
    core_hHrr: Tensor | None
    slots_THm: Tensor
    factors_2THmr: Tensor


class _Select(Function):
    """The scores' gradient reaches the selected pairs only.

    The way back touches their keys and queries, and allocates nothing of the size of all scores
    (T, H, n).
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries_TGd: Tensor,
        keys_2Hnrd: Tensor,
        core_hHrr: Tensor | None,
        search: Search,
        groups_2Hr: Tensor,
        top_m: int,
        library: ctypes.CDLL,
    ) -> tuple[Tensor, Tensor]:
        # Aliases: an input that is a ZeRO-3 parameter loses its data when its module returns.
        keys_2Hnrd = keys_2Hnrd.detach()
        core_hHrr = None if core_hHrr is None else core_hHrr.detach()
        num_heads, rank = groups_2Hr.shape[1:]
        factors_2THmr = queries_TGd.new_empty(2, len(queries_TGd), num_heads, top_m, rank)
        slots_THm, scores_THmh = _select_forward(
            library,
            search,
            queries_TGd,
            groups_2Hr,
            keys_2Hnrd,
            core_hHrr,
            top_m,
            factors_2THmr,
        )
        saved = _Saved(queries_TGd, groups_2Hr, keys_2Hnrd, core_hHrr, slots_THm, factors_2THmr)
        ctx.save_for_backward(*saved)
        ctx.library = library
        ctx.mark_non_differentiable(slots_THm)
        return slots_THm, scores_THmh

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, grad_THmh: Tensor) -> tuple[Tensor | None, ...]:
        saved = _Saved(*ctx.saved_tensors)
        core_hHrr = saved.core_hHrr
        num_tokens, num_heads, top_m, num_cores = grad_THmh.shape
        grad_queries = torch.empty_like(saved.queries_TGd)
        grad_keys = torch.empty_like(saved.keys_2Hnrd)
        grad_core = None if core_hHrr is None else torch.empty_like(core_hHrr)
        grad_factors = torch.empty_like(saved.factors_2THmr)
        ctx.library.ultramem_select_backward(
            address(grad_THmh.contiguous()),
            address(saved.factors_2THmr),
            address(saved.slots_THm),
            address(saved.queries_TGd),
            address(saved.groups_2Hr),
            address(saved.keys_2Hnrd),
            address(core_hHrr),
            num_tokens,
            num_heads,
            *saved.keys_2Hnrd.shape[2:],
            saved.queries_TGd.shape[1],
            top_m,
            num_cores,
            address(grad_factors),
            address(grad_queries),
            address(grad_keys),
            address(grad_core),
        )
        return grad_queries, grad_keys, grad_core, None, None, None, None


def _select_forward(
    library: ctypes.CDLL,
    search: Search,
    queries_TGd: Tensor,
    groups_2Hr: Tensor,
    keys_2Hnrd: Tensor,
    core_hHrr: Tensor | None,
    top_m: int,
    factors_2THmr: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The selection without a gradient; see ``Kernel.select``.

    ``factors_2THmr`` gets the pairs' row and column scores unless it is None.
    """
    num_tokens, num_heads = len(queries_TGd), keys_2Hnrd.shape[1]
    num_cores = 1 if core_hHrr is None else core_hHrr.shape[0]
    slots_THm = groups_2Hr.new_empty(num_tokens, num_heads, top_m)
    scores_THmh = queries_TGd.new_empty(num_tokens, num_heads, top_m, num_cores)
    for begin in range(0, num_tokens, TOKENS_PER_SEARCH):
        tokens = slice(begin, begin + TOKENS_PER_SEARCH)
        search_2THn = search(tokens)
        assert search_2THn.stride(-1) == 1
        library.ultramem_select(
            search_2THn.data_ptr(),
            *search_2THn.stride()[:3],
            address(queries_TGd[tokens]),
            address(groups_2Hr),
            address(keys_2Hnrd),
            address(core_hHrr),
            search_2THn.shape[1],
            num_heads,
            *keys_2Hnrd.shape[2:],
            queries_TGd.shape[1],
            top_m,
            num_cores,
            0 if factors_2THmr is None else factors_2THmr.stride(0),
            address(slots_THm[tokens]),
            address(scores_THmh[tokens]),
            None if factors_2THmr is None else factors_2THmr[:, tokens].data_ptr(),
        )
    return slots_THm, scores_THmh


class _CausalConv(Function):
    """Without a state: what training runs."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BSD: Tensor,
        weight_kD: Tensor,
        doc_boundaries_BS: Tensor | None,
        library: ctypes.CDLL,
    ) -> Tensor:
        # A copy: under ZeRO-3 the parameter's data goes when its module's forward returns.
        ctx.save_for_backward(x_BSD, weight_kD.detach().clone(), doc_boundaries_BS)
        ctx.library = library
        return conv_forward(library, x_BSD, weight_kD, doc_boundaries_BS, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSD: Tensor) -> tuple[Tensor | None, ...]:
        x_BSD, weight_kD, doc_boundaries_BS = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x_BSD), torch.empty_like(weight_kD)
        ctx.library.ultramem_conv_backward(
            address(grad_BSD.contiguous()),
            address(x_BSD),
            address(doc_boundaries_BS),
            address(weight_kD),
            *x_BSD.shape,
            len(weight_kD),
            address(grad_x),
            address(grad_weight),
        )
        return grad_x, grad_weight, None, None


def conv_forward(
    library: ctypes.CDLL,
    x_BSD: Tensor,
    weight_kD: Tensor,
    doc_boundaries_BS: Tensor | None,
    state_BCD: Tensor | None,
) -> Tensor:
    """The convolution without a gradient; all tensors dense."""
    out_BSD = torch.empty_like(x_BSD)
    library.ultramem_conv(
        address(x_BSD),
        address(state_BCD),
        address(doc_boundaries_BS),
        address(weight_kD),
        *x_BSD.shape,
        len(weight_kD),
        address(out_BSD),
    )
    return out_BSD


def select(
    library: ctypes.CDLL,
    search: Search,
    queries_TGd: Tensor,
    groups_2Hr: Tensor,
    keys_2Hnrd: Tensor,
    core_hHrr: Tensor | None,
    top_m: int,
) -> tuple[Tensor, Tensor]:
    """``Kernel.select`` of one-sided candidates in fp32; tensors dense."""
    if not torch.is_grad_enabled():
        return _select_forward(
            library, search, queries_TGd, groups_2Hr, keys_2Hnrd, core_hHrr, top_m, None
        )
    selected: tuple[Tensor, Tensor] = _Select.apply(
        queries_TGd, keys_2Hnrd, core_hHrr, search, groups_2Hr, top_m, library
    )
    return selected


def causal_conv(
    library: ctypes.CDLL, x_BSD: Tensor, weight_kD: Tensor, doc_boundaries_BS: Tensor | None
) -> Tensor:
    """``Kernel.causal_conv`` without a state, in fp32; tensors dense; differentiable."""
    out_BSD: Tensor = _CausalConv.apply(x_BSD, weight_kD, doc_boundaries_BS, library)
    return out_BSD
