"""Matrices as decoding wants them: those of one product, or of all experts, in one tensor.

Letters: M rows, K inner, N outputs, X groups (experts; 1 for an ordinary linear map).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultramem_ds.kernels.packed import can_pack, grouped_linear, pack_into, packed_shape


class GroupedWeights(Protocol):
    """X matrices of one shape; a module."""

    def __call__(self, x_MK: Tensor, ends_X: Tensor) -> Tensor:
        """``(M, N)``: rows ``ends[g - 1] : ends[g]`` times matrix g; idle matrices are not read."""
        ...


class StackedWeights(nn.Module):
    """Matrices in torch's layout, multiplied by ``torch.nn.functional.grouped_mm``."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__()
        like = linears[0].weight
        stacked_XNK = like.new_empty(len(linears), *like.shape)
        for slot, linear in zip(stacked_XNK, linears):
            slot.copy_(linear.weight.detach())
            release(linear)
        self.stacked_XNK = nn.Parameter(stacked_XNK, requires_grad=False)

    def forward(self, x_MK: Tensor, ends_X: Tensor) -> Tensor:
        """See :class:`GroupedWeights`."""
        stacked_XKN = self.stacked_XNK.transpose(1, 2)
        return F.grouped_mm(x_MK, stacked_XKN, offs=ends_X.to(torch.int32))


class PackedWeights(nn.Module):
    """fp32 matrices of a CPU, repacked for ``kernels.packed``.

    Args:
        packed_XQKP: see ``kernels.packed.packed_shape``.
        num_outputs: N.
    """

    def __init__(self, packed_XQKP: Tensor, num_outputs: int) -> None:
        super().__init__()
        self.packed_XQKP = nn.Parameter(packed_XQKP, requires_grad=False)
        self.num_outputs = num_outputs

    @classmethod
    def pack(cls, linears: Sequence[nn.Linear]) -> PackedWeights:
        """Take over the linear maps' weights."""
        like = linears[0].weight
        packed_XQKP = like.new_empty(len(linears), *packed_shape(*like.shape))
        for slot, linear in zip(packed_XQKP, linears):
            pack_into(slot, linear.weight.detach())
            release(linear)
        return cls(packed_XQKP, like.shape[0])

    def forward(self, x_MK: Tensor, ends_X: Tensor) -> Tensor:
        """See :class:`GroupedWeights`."""
        return grouped_linear(x_MK, self.packed_XQKP.detach(), ends_X, self.num_outputs)


class PackedLinear(nn.Module):
    """The function of an ``nn.Linear`` without bias, on packed weights."""

    def __init__(self, weights: PackedWeights) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        """``(..., K)`` to ``(..., N)``."""
        x_MK = x.reshape(-1, x.shape[-1])
        ends = torch.tensor([x_MK.shape[0]])
        return self.weights(x_MK, ends).view(*x.shape[:-1], -1)


# Turns linear maps of one shape into the weights of a grouped product, or None to leave them.
Packer: TypeAlias = Callable[[Sequence[nn.Linear]], PackedWeights | None]


def pack_where_possible(linears: Sequence[nn.Linear]) -> PackedWeights | None:
    """Pack fp32 weights on a CPU with a compiler; leave all others to torch."""
    return PackedWeights.pack(linears) if can_pack(linears[0].weight) else None


def release(linear: nn.Linear) -> None:
    """Free a weight that has been copied elsewhere: at most one is held twice."""
    linear.weight = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)
