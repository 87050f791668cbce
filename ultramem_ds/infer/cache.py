"""What decoding carries from call to call: keys and values per block, convolution states.

Sequences of one batch end at the same column: shorter prompts are padded on the left. A padded
column is seen by nobody, rotary positions count from a sequence's first token, and the memory's
query convolution sees zeros before it.

Letters: B sequences, A attention heads, S new positions, C capacity in positions, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ultramem_ds.model.lm import LanguageModel, StepInputs

BLOCK_SIZE = 256  # positions that a cache grows by


class KVCache:
    """Keys and values of one block, in a buffer that grows by whole blocks of positions."""

    def __init__(self, block_size: int = BLOCK_SIZE) -> None:
        self.block_size = block_size
        self.length = 0
        self.keys_BACK: Tensor | None = None
        self.values_BACK: Tensor | None = None

    def update(self, keys_BASK: Tensor, values_BASK: Tensor) -> tuple[Tensor, Tensor]:
        """Append new positions; return all keys and values so far."""
        begin, end = self.length, self.length + keys_BASK.shape[2]
        self.reserve(end, keys_BASK)
        assert self.keys_BACK is not None and self.values_BACK is not None
        self.keys_BACK[:, :, begin:end] = keys_BASK
        self.values_BACK[:, :, begin:end] = values_BASK
        self.length = end
        return self.keys_BACK[:, :, :end], self.values_BACK[:, :, :end]

    @property
    def capacity(self) -> int:
        """Positions that fit without growing."""
        return 0 if self.keys_BACK is None else self.keys_BACK.shape[2]

    def reserve(self, end: int, like_BASK: Tensor) -> None:
        """Make room for ``end`` positions of tensors like ``like_BASK``."""
        if self.capacity >= end:
            return
        self.keys_BACK = self._grown(self.keys_BACK, like_BASK, end)
        self.values_BACK = self._grown(self.values_BACK, like_BASK, end)

    def _grown(self, buffer: Tensor | None, like_BASK: Tensor, end: int) -> Tensor:
        B, A, _, K = like_BASK.shape
        capacity = -(-end // self.block_size) * self.block_size
        grown = like_BASK.new_zeros((B, A, capacity, K))
        if buffer is not None:
            grown[:, :, : self.length] = buffer[:, :, : self.length]
        return grown

    def select(self, rows: Tensor) -> None:
        """Keep only these sequences."""
        if self.keys_BACK is not None and self.values_BACK is not None:
            self.keys_BACK = self.keys_BACK.index_select(0, rows)
            self.values_BACK = self.values_BACK.index_select(0, rows)


class DecodeCache:
    """State of a batch of sequences that are decoded together.

    Args:
        model: whose blocks and memory layers the state belongs to.
        padding: columns of padding before each sequence's first token, one per sequence.
        block_size: positions that the buffers grow by.
    """

    def __init__(
        self, model: LanguageModel, padding: Sequence[int], block_size: int = BLOCK_SIZE
    ) -> None:
        self.kv = [KVCache(block_size) for _ in model.blocks]
        self.conv: list[Tensor | None] = [None] * len(model.memories)
        self.padding = list(padding)
        self.device = model.embedding.weight.device
        self._begins_B = torch.tensor(self.padding, device=self.device)

    @property
    def length(self) -> int:
        """Columns already seen, padding included."""
        return self.kv[0].length

    def enter(self, num_new: int) -> StepInputs:
        """What a forward over ``num_new`` further columns is given; see ``StepInputs``."""
        begin, end = self.length, self.length + num_new
        index_S = torch.arange(begin, end, device=self.device)
        if max(self.padding) == 0:
            columns = torch.arange(end, device=self.device)
            visible = (columns <= index_S.unsqueeze(1)).view(1, 1, num_new, end)
            plain = begin == 0 or num_new == 1
            return StepInputs(index_S.unsqueeze(0), None if plain else visible, None)
        columns = torch.arange(end, device=self.device)
        begins_B11 = self._begins_B.view(-1, 1, 1)
        visible = (columns <= index_S.unsqueeze(1)) & (columns >= begins_B11)
        # A padded query sees itself alone: a softmax over nothing would be NaN.
        mask_BSS = (visible | (columns == index_S.unsqueeze(1))).unsqueeze(1)
        self._forget_padded_convolution(begin)
        positions_BS = (index_S - self._begins_B.unsqueeze(1)).clamp(min=0)
        return StepInputs(positions_BS, mask_BSS, index_S == self._begins_B.unsqueeze(1))

    def keep_conv(self, index: int, inputs_BSD: Tensor, state_BCD: Tensor | None) -> None:
        """See ``model.lm.DecodeState``: all sequences end at the last column."""
        self.conv[index] = state_BCD

    def _forget_padded_convolution(self, begin: int) -> None:
        """Zero the convolutions' inputs of padded columns: nothing precedes the first token."""
        for j, state_BCD in enumerate(self.conv):
            if state_BCD is None or begin - state_BCD.shape[1] >= max(self.padding):
                continue
            columns = torch.arange(begin - state_BCD.shape[1], begin, device=self.device)
            real_BC = columns >= self._begins_B.unsqueeze(1)
            self.conv[j] = state_BCD * real_BC.unsqueeze(2)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these sequences of the batch, in this order."""
        index = torch.tensor(list(rows), device=self.device)
        for kv in self.kv:
            kv.select(index)
        self.conv = [None if state is None else state.index_select(0, index) for state in self.conv]
        self.padding = [self.padding[row] for row in rows]
        self._begins_B = self._begins_B.index_select(0, index)
