"""Copies that ZeRO-3 makes at every step and need not make.

Each is a second copy of all of a rank's weights or gradients, for tables the largest thing it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def step_in_place(zero: Any) -> None:
    """Let weights be their own masters, and the step read gradients where they were summed.

    Under offload both lie elsewhere, and nothing changes. Call once after
    ``deepspeed.initialize``.

    Args:
        zero: DeepSpeed's ZeRO-3 optimizer.
    """
    if zero.offload_optimizer:
        return
    _share_masters(zero)
    copying = zero.flatten

    def flatten(tensors: Sequence[Tensor]) -> Tensor:
        whole = adjacent(tensors)
        return copying(tensors) if whole is None else whole

    zero.flatten = flatten


def _share_masters(zero: Any) -> None:
    """ZeRO-3 means to for fp32 weights, but compares a device with its name and copies them."""
    for weights, masters in zip(
        zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat
    ):
        if weights.dtype == masters.dtype:
            masters.data = weights.data


def adjacent(tensors: Sequence[Tensor]) -> Tensor | None:
    """One flat view of tensors that lie one behind the other in one storage, or None."""
    first, end = tensors[0], tensors[0].data_ptr()
    storage = first.untyped_storage().data_ptr()
    for tensor in tensors:
        here = tensor.data_ptr() == end and tensor.untyped_storage().data_ptr() == storage
        if not here or tensor.dtype != first.dtype or not tensor.is_contiguous():
            return None
        end += tensor.nbytes
    return first.as_strided((sum(tensor.numel() for tensor in tensors),), (1,))
