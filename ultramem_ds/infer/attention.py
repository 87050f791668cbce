"""Attention of a decode step: one new token over its cache, natively on a CPU."""

from __future__ import annotations

from torch import Tensor

from ultramem_ds.kernels.packed import attend_to_cache
from ultramem_ds.model.transformer import causal_attention


def decode_attention(
    q_BASK: Tensor, k_BASK: Tensor, v_BASK: Tensor, mask_BSS: Tensor | None, dropout: float
) -> Tensor:
    """See ``model.transformer.Attend``; prefill and padded batches stay with torch."""
    native = q_BASK.shape[2] == 1 and mask_BSS is None and q_BASK.shape[3] % 16 == 0
    if native and k_BASK.stride() == v_BASK.stride() and k_BASK.stride(-1) == 1:
        return attend_to_cache(q_BASK, k_BASK, v_BASK)
    return causal_attention(q_BASK, k_BASK, v_BASK, mask_BSS, dropout)
