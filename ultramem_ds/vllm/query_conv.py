"""The memory's query convolution under continuous batching.

A causal convolution of k taps is attention with a window of k tokens and fixed weights. So its
state is kept as vLLM keeps the keys of sliding-window attention: the convolution's *inputs* lie in
paged blocks, of which a request holds those that its last k tokens touch. Whatever vLLM does with
such blocks is then right by construction: requests that join, leave or are preempted, prompts cut
into chunks, prefixes shared between requests, drafted tokens that are rejected.

Letters: T tokens of all requests together, R requests, D hidden, k taps, N tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec


@dataclass(frozen=True)
class WindowMetadata(AttentionMetadata):
    """Where the inputs of one forward's tokens, and of those before them, lie.

    Attributes:
        slots_T: each token's own place, block * N + offset, int64.
        past_slots_Tk: places of the k - 1 tokens before it, oldest first, ``(T, k - 1)``.
        exists_Tk: False where the request has no such token.
    """

    slots_T: Tensor
    past_slots_Tk: Tensor
    exists_Tk: Tensor


def past_slots(
    query_starts_R1: Tensor, lengths_R: Tensor, block_table: Tensor, block_size: int, reach: int
) -> tuple[Tensor, Tensor]:
    """Places of the ``reach`` tokens before each token, and whether there are such.

    Two requests, blocks of 4, reach 1: the first has seen 4 tokens and brings 2 (positions 4, 5),
    the second brings its first one: ``query_starts = [0, 2, 3]``, ``lengths = [6, 1]``. With block
    tables ``[[7, 2], [5, 0]]`` the answer is slots ``[31, 8, 20]`` (position 3 is the last of block
    7, position 4 the first of block 2) and ``[True, True, False]``.

    Args:
        query_starts_R1: index of each request's first new token, and T; ``(R + 1,)``.
        lengths_R: tokens of each request, these included.
        block_table: blocks of each request in order, ``(R, blocks)``.
        block_size: N.
        reach: k - 1.

    Returns:
        ``(T, reach)`` int64 slots, oldest first, and ``(T, reach)`` bool.
    """
    num_new_R = query_starts_R1.diff()
    requests = torch.arange(len(num_new_R), device=lengths_R.device)
    request_T = requests.repeat_interleave(num_new_R)
    index_T = torch.arange(len(request_T), device=lengths_R.device)
    position_T = index_T + (lengths_R - query_starts_R1[1:])[request_T]
    distances = torch.arange(reach, 0, -1, device=lengths_R.device)
    position_Tk = position_T.unsqueeze(1) - distances
    exists_Tk = position_Tk >= 0
    position_Tk = position_Tk.clamp(min=0)
    block_Tk = block_table[request_T.unsqueeze(1), position_Tk // block_size].long()
    return block_Tk * block_size + position_Tk % block_size, exists_Tk


class WindowMetadataBuilder(AttentionMetadataBuilder[WindowMetadata]):
    """Builds :class:`WindowMetadata` once per forward for all convolutions of a cache group."""

    def __init__(
        self,
        kv_cache_spec: SlidingWindowSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.block_size = kv_cache_spec.block_size
        self.reach = vllm_config.model_config.hf_config.memory_query_conv - 1

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> WindowMetadata:
        """See the base class."""
        common = common_attn_metadata
        past_slots_Tk, exists_Tk = past_slots(
            common.query_start_loc,
            common.seq_lens,
            common.block_table_tensor,
            self.block_size,
            self.reach,
        )
        return WindowMetadata(common.slot_mapping[: len(exists_Tk)], past_slots_Tk, exists_Tk)


class WindowBackend(AttentionBackend):
    """Names the builder; there are no attention kernels."""

    @staticmethod
    def get_name() -> str:
        """Of the backend."""
        return "ULTRAMEM_QUERY_CONV"

    @staticmethod
    def get_impl_cls() -> type:
        """There is none: the convolution reads its blocks itself."""
        raise NotImplementedError("the query convolution has no attention implementation")

    @staticmethod
    def get_builder_cls() -> type[WindowMetadataBuilder]:
        """See the base class."""
        return WindowMetadataBuilder


class PagedCausalConv(nn.Module, AttentionLayerBase):
    """``model.memory.query.CausalConv`` for requests of any mixture.

    Args:
        hidden_size: D.
        kernel_size: k.
        prefix: its name among vLLM's layers with a cache; the number in it is its own.
    """

    def __init__(self, hidden_size: int, kernel_size: int, prefix: str) -> None:
        super().__init__()
        vllm_config = get_current_vllm_config()
        self.prefix = prefix
        self.kernel_size = kernel_size
        self.weight = nn.Parameter(torch.empty(kernel_size, hidden_size), requires_grad=False)
        self.dtype = vllm_config.model_config.dtype
        self.kv_cache = torch.tensor([])  # (blocks, 1, N, D or more), bound by vLLM
        vllm_config.compilation_config.static_forward_context[prefix] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        """See the base class."""
        return WindowBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """A window of k tokens of D numbers.

        All pages of vLLM's cache are equally large. Attention's hold 2 D / ranks numbers a token:
        ours are filled up to that, so that both get blocks of the same number of tokens.
        """
        hidden_size = self.weight.shape[1]
        attention_width = 2 * hidden_size // vllm_config.parallel_config.tensor_parallel_size
        return SlidingWindowSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=hidden_size,
            head_size_v=max(attention_width - hidden_size, 0),
            dtype=self.dtype,
            sliding_window=self.kernel_size,
        )

    def forward(
        self, x_BSD: Tensor, doc_boundaries_BS: Tensor | None, state_BCD: Tensor | None
    ) -> tuple[Tensor, None]:
        """Convolve the tokens of one vLLM batch, ``(1, T, D)``; the state is in the cache."""
        assert doc_boundaries_BS is None and state_BCD is None
        x_TD = x_BSD[0]
        out_TD = x_TD * self.weight[-1]
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # vLLM measures memory, without a cache
            return out_TD[None], None
        window: WindowMetadata = metadata[self.prefix]
        hidden_size, block_size = x_TD.shape[1], self.kv_cache.shape[2]
        num_tokens = len(window.slots_T)
        inputs_BND = self.kv_cache[:, 0, :, :hidden_size]
        slots_T = window.slots_T
        inputs_BND[slots_T // block_size, slots_T % block_size] = x_TD[:num_tokens]
        for tap in range(self.kernel_size - 1):
            past_T = window.past_slots_Tk[:, tap]
            past_TD = inputs_BND[past_T // block_size, past_T % block_size]
            past_TD = past_TD * window.exists_Tk[:, tap].unsqueeze(1)
            out_TD[:num_tokens] += past_TD * self.weight[tap]
        return out_TD[None], None
