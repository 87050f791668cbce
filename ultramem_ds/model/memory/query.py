"""Queries: causal depthwise convolution, linear projection in one of three layouts, norm."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from ultramem_ds.config.schema import MemoryConfig, ModelConfig
from ultramem_ds.kernels import resolve
from ultramem_ds.model.roles import tag

# B sequences, S sequence length, T = B*S tokens, D hidden, H heads, r Tucker rank, d kdim.


def qk_norm(memory: MemoryConfig, eps: float, init: str) -> nn.Module:
    """Normalisation over kdim with one weight vector and no bias, or none."""
    if memory.qk_norm == "none":
        return nn.Identity()
    norm: nn.LayerNorm | nn.RMSNorm
    if memory.qk_norm == "layernorm":
        norm = nn.LayerNorm(memory.kdim, eps=eps, bias=False)
    else:
        norm = nn.RMSNorm(memory.kdim, eps=eps)
    tag(norm.weight, role="norm", init=init)
    return norm


class CausalConv(nn.Module):
    """Causal depthwise convolution over the sequence (paper section 3.2, trick 4).

    Token s sees the inputs of tokens s-k+1..s. The inputs of the last k-1 tokens are the decoding
    state: (B, k-1, D), zeros before the first token. It begins with the last ``query_tokens`` taps.
    """

    def __init__(
        self, hidden_size: int, kernel_size: int, kernel: str = "auto", query_tokens: int = 1
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.kernel = kernel
        self.weight = nn.Parameter(torch.empty(kernel_size, hidden_size))  # last tap = this token
        self.weight.query_tokens = query_tokens  # type: ignore[attr-defined]
        tag(self.weight, role="matrix", init="memory_conv")

    def forward(
        self, x_BSD: Tensor, doc_boundaries_BS: Tensor | None, state_BCD: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Convolve.

        Args:
            x_BSD: Inputs.
            doc_boundaries_BS: True at the first token of a document; taps do not cross it.
            state_BCD: The k-1 inputs before ``x_BSD``; None at the start of a sequence.

        Returns:
            The convolved inputs (B, S, D) and the state after them (B, k-1, D).
        """
        kernel = resolve(self.kernel, x_BSD.device)
        out_BSD = kernel.causal_conv(x_BSD, self.weight, doc_boundaries_BS, state_BCD)
        return out_BSD, _last_inputs(x_BSD, state_BCD, self.kernel_size - 1)


def _last_inputs(x_BSD: Tensor, state_BCD: Tensor | None, count: int) -> Tensor:
    """The last ``count`` inputs of each sequence, zeros before the first."""
    batch, seq_len, hidden = x_BSD.shape
    if seq_len < count:
        if state_BCD is None:
            state_BCD = x_BSD.new_zeros(batch, count, hidden)
        x_BSD = torch.cat([state_BCD[:, seq_len:], x_BSD], dim=1)
    return x_BSD[:, x_BSD.shape[1] - count :]


class NoConv(nn.Module):
    """``memory.query_conv=0``: passes inputs through, keeps no state."""

    def forward(
        self, x_BSD: Tensor, doc_boundaries_BS: Tensor | None, state_BCD: Tensor | None
    ) -> tuple[Tensor, None]:
        """Return the inputs and no state."""
        return x_BSD, None


# Distinct queries of one token, by layout: s side (row, column), h head, r Tucker rank.
LAYOUTS = {"shared": "s", "per-head": "hs", "per-head-shared-sides": "hr"}


@functools.cache
def query_groups(layout: str, num_heads: int, rank: int, device: torch.device) -> Tensor:
    """Which of a token's distinct queries meets the keys of a side, head and rank.

    Args:
        layout: a value of ``LAYOUTS``.
        num_heads: H.
        rank: r.
        device: of the result.

    Returns:
        int64 (2, H, r).
    """
    sizes = {"s": 2, "h": num_heads, "r": rank}
    index = torch.zeros((1, 1, 1), dtype=torch.int64, device=device)
    for letter in layout:
        shape = [-1 if letter == dim else 1 for dim in "shr"]
        steps = torch.arange(sizes[letter], device=device).view(shape)
        index = index * sizes[letter] + steps
    return index.expand(2, num_heads, rank).contiguous()


class QueryEncoder(nn.Module):
    """Hidden states -> normalised queries, one per (token, ``LAYOUTS`` dimension).

    Layouts (DESIGN 3.2): ``shared`` D -> 2*d, first d for rows, second for columns, used by all
    heads and ranks; ``per-head`` D -> H*2*d; ``per-head-shared-sides`` D -> H*r*d, one query for
    both sides, split over the ranks as in eq. 4. ``layer`` is the number of the memory layer.
    """

    def __init__(self, model: ModelConfig, memory: MemoryConfig, layer: int = 0) -> None:
        super().__init__()
        sizes = {"s": 2, "h": memory.num_heads, "r": memory.tucker_rank}
        self.group_sizes = tuple(sizes[letter] for letter in LAYOUTS[memory.query])
        self.kdim = memory.kdim
        self.conv = (
            CausalConv(
                model.hidden_size,
                memory.query_conv,
                memory.kernel,
                memory.tokens_of_queries[layer],
            )
            if memory.query_conv
            else NoConv()
        )
        width = math.prod(self.group_sizes) * memory.kdim
        self.proj = nn.Linear(model.hidden_size, width, bias=False)
        tag(self.proj.weight, role="matrix", init="memory_query")
        self.norm = qk_norm(memory, model.norm_eps, init="memory_query_norm")

    def forward(
        self, x_BSD: Tensor, doc_boundaries_BS: Tensor | None, conv_state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Encode.

        Args:
            x_BSD: Hidden states.
            doc_boundaries_BS: See ``CausalConv``.
            conv_state: See ``CausalConv``.

        Returns:
            Queries (T, 2, d), (T, H, 2, d) or (T, H, r, d) by layout, and the new state.
        """
        x_BSD, conv_state = self.conv(x_BSD, doc_boundaries_BS, conv_state)
        queries = self.proj(x_BSD).view(-1, *self.group_sizes, self.kdim)
        return self.norm(queries), conv_state
