"""Matrices as decoding wants them: those of one product, or of all experts, in one tensor.

Letters: M rows, K inner, N outputs, X groups (experts; 1 for an ordinary linear map).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ultramem_ds.kernels import resolve


class GroupedWeights(nn.Module):
    """X matrices of one shape, laid out for the kernel that multiplies with them.

    Args:
        packed_X: see ``Kernel.packed_shape``.
        num_outputs: N.
    """

    def __init__(self, packed_X: Tensor, num_outputs: int) -> None:
        super().__init__()
        self.packed_X = nn.Parameter(packed_X, requires_grad=False)
        self.num_outputs = num_outputs

    @classmethod
    def pack(cls, linears: Sequence[nn.Linear]) -> GroupedWeights:
        """Take over the linear maps' weights."""
        like = linears[0].weight
        kernel = resolve("auto", like.device)
        packed_X = like.new_empty(len(linears), *kernel.packed_shape(*like.shape, dtype=like.dtype))
        for slot, linear in zip(packed_X, linears):
            kernel.pack_into(slot, linear.weight.detach())
            release(linear)
        return cls(packed_X, like.shape[0])

    def forward(self, x_MK: Tensor, ends_X: Tensor) -> Tensor:
        """``(M, N)``: rows ``ends[g - 1] : ends[g]`` times matrix g; idle matrices are not read."""
        packed_X = self.packed_X.detach()
        kernel = resolve("auto", packed_X.device)
        return kernel.grouped_linear(x_MK, packed_X, ends_X, self.num_outputs)


class PackedLinear(nn.Module):
    """The function of an ``nn.Linear`` without bias, on packed weights."""

    def __init__(self, weights: GroupedWeights) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        """``(..., K)`` to ``(..., N)``."""
        x_MK = x.reshape(-1, x.shape[-1])
        ends = torch.tensor([x_MK.shape[0]])
        return self.weights(x_MK, ends).view(*x.shape[:-1], -1)


# Turns linear maps of one shape into the weights of a grouped product.
Packer: TypeAlias = Callable[[Sequence[nn.Linear]], GroupedWeights]


def release(linear: nn.Linear) -> None:
    """Free a weight that has been copied elsewhere: at most one is held twice."""
    linear.weight = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)
