"""What decoding carries from call to call: keys and values per block, convolution states.

Letters: B sequences, A attention heads, S positions, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.model.transformer import KVSlot


class KVCache:
    """Keys and values of one block, in a buffer that grows by whole blocks of positions."""

    def __init__(self, block_size: int = 256) -> None:
        self.block_size = block_size
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def update(self, keys_BASK: Tensor, values_BASK: Tensor) -> tuple[Tensor, Tensor]:
        """Append new positions; return all keys and values so far."""
        begin, end = self.length, self.length + keys_BASK.shape[2]
        self._keys = self._grown(self._keys, keys_BASK, end)
        self._values = self._grown(self._values, values_BASK, end)
        self._keys[:, :, begin:end] = keys_BASK
        self._values[:, :, begin:end] = values_BASK
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def _grown(self, buffer: Tensor | None, like_BASK: Tensor, end: int) -> Tensor:
        if buffer is not None and buffer.shape[2] >= end:
            return buffer
        B, A, _, K = like_BASK.shape
        capacity = -(-end // self.block_size) * self.block_size
        grown = like_BASK.new_zeros((B, A, capacity, K))
        if buffer is not None:
            grown[:, :, : self.length] = buffer[:, :, : self.length]
        return grown


class DecodeCache:
    """State of a batch of sequences that are decoded together."""

    def __init__(self, model: LanguageModel) -> None:
        self.kv: list[KVSlot] = [KVCache() for _ in model.blocks]
        self.conv: list[Tensor | None] = [None for _ in model.memories]
        self._device = model.embedding.weight.device

    @property
    def length(self) -> int:
        """Positions already seen."""
        return self.kv[0].length

    def mask(self, num_new: int) -> Tensor | None:
        """Causal mask of ``num_new`` positions after ``length`` old ones."""
        if self.length == 0:
            return None
        total = self.length + num_new
        columns = torch.arange(total, device=self._device)
        rows = torch.arange(self.length, total, device=self._device)
        return (columns <= rows.unsqueeze(1)).view(1, 1, num_new, total)
