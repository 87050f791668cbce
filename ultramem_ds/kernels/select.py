"""A memory layer's two-stage selection in one native call, differentiable: ``csrc/select.cpp``.

The scores' gradient reaches the selected pairs only: the way back touches their keys and queries,
and allocates nothing of the size of all scores (T, H, n).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ultramem_ds.kernels.native import address

# T tokens, H heads, n keys per side, r rank, h cores, m top-m, G queries of a token, d kdim.
# A leading 2 is the side: rows, then columns.

TOKENS_PER_SEARCH = 256  # their scores are read back from the cache they were written to
# Tokens of a batch -> their candidate scores.
Search: TypeAlias = Callable[[slice], Tensor]


class _Saved(NamedTuple):
    """What the way back needs."""

    queries_TGd: Tensor
    groups_2Hr: Tensor
    keys_2Hnrd: Tensor
    core_hHrr: Tensor | None
    slots_THm: Tensor
    factors_2THmr: Tensor


class _Select(Function):
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
        slots_THm, scores_THmh = _forward(
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


def _forward(
    library: ctypes.CDLL,
    search: Search,
    queries_TGd: Tensor,
    groups_2Hr: Tensor,
    keys_2Hnrd: Tensor,
    core_hHrr: Tensor | None,
    top_m: int,
    factors_2THmr: Tensor | None,
) -> tuple[Tensor, Tensor]:
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


def select_slots(
    library: ctypes.CDLL,
    search: Search,
    queries_TGd: Tensor,
    groups_2Hr: Tensor,
    keys_2Hnrd: Tensor,
    core_hHrr: Tensor | None,
    top_m: int,
) -> tuple[Tensor, Tensor]:
    """A memory layer's two-stage selection (``model.memory.retrieval``) in one call.

    Of equal scores the key, or pair of candidates, of the smallest number comes first.

    Args:
        library: of ``kernels.native``.
        search: gives candidate scores (2, tokens, H, n) of a run of tokens, fp32, last dimension
            contiguous; called without gradients, for runs short enough that they stay in the cache.
        queries_TGd: a token's distinct queries, fp32.
        groups_2Hr: int64, which of them meets the keys of a side, head and rank.
        keys_2Hnrd: fp32.
        core_hHrr: Tucker cores, fp32; None: a pair's score is the sum of its row's and column's.
        top_m: m, at most n.

    Returns:
        Slots ``(T, H, m)``, int64, and scores per core ``(T, H, m, h)``, best first, differentiable
        in queries, keys and cores.
    """
    queries_TGd, keys_2Hnrd = queries_TGd.contiguous(), keys_2Hnrd.contiguous()
    core_hHrr = None if core_hHrr is None else core_hHrr.contiguous()
    if torch.is_grad_enabled():
        selected: tuple[Tensor, Tensor] = _Select.apply(
            queries_TGd, keys_2Hnrd, core_hHrr, search, groups_2Hr, top_m, library
        )
        return selected
    return _forward(library, search, queries_TGd, groups_2Hr, keys_2Hnrd, core_hHrr, top_m, None)
