"""Decode steps of a GPU as CUDA graphs: one launch instead of a thousand.

A graph replays fixed addresses and shapes. The state below therefore keeps its position on the
device, writes keys and values at that position and attends to the whole buffer under a mask. A
graph serves one (batch size, capacity): it is captured anew when a sequence leaves or the buffers
grow by a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ultramem_ds.infer.cache import DecodeCache
from ultramem_ds.infer.experts import GroupedExperts
from ultramem_ds.model.lm import LanguageModel, StepInputs

# B sequences, A attention heads, C capacity in positions, K head width, W vocabulary.

_WARM_UP_STEPS = 3  # before a capture: kernels are built and workspaces allocated


@dataclass(frozen=True)
class FixedKV:
    """One block's buffers, written at a position that lives on the device."""

    keys_BACK: Tensor
    values_BACK: Tensor
    position_1: Tensor

    def update(self, keys_BASK: Tensor, values_BASK: Tensor) -> tuple[Tensor, Tensor]:
        """Write one position; return the whole buffers, whose tail the mask hides."""
        self.keys_BACK.index_copy_(2, self.position_1, keys_BASK)
        self.values_BACK.index_copy_(2, self.position_1, values_BASK)
        return self.keys_BACK, self.values_BACK


class FixedState:
    """A :class:`DecodeCache` between two growths, for steps of one token at fixed addresses.

    Raises:
        ValueError: if the cache has no room for another position.
    """

    def __init__(self, cache: DecodeCache) -> None:
        self.capacity = cache.kv[0].capacity
        if self.capacity <= cache.length:
            raise ValueError(f"the cache is full at {cache.length} positions; reserve first")
        self.position_1 = torch.tensor([cache.length], device=cache.device)
        self.columns_C = torch.arange(self.capacity, device=cache.device)
        self.begins_B1 = torch.tensor(cache.padding, device=cache.device).unsqueeze(1)
        self.kv: list[FixedKV] = []
        for kv in cache.kv:
            assert kv.keys_BACK is not None and kv.values_BACK is not None
            self.kv.append(FixedKV(kv.keys_BACK, kv.values_BACK, self.position_1))
        self.addresses = [None if state is None else state.clone() for state in cache.conv]
        self.conv: list[Tensor | None] = list(self.addresses)

    def enter(self, num_new: int) -> StepInputs:
        """What a forward over one further column is given."""
        assert num_new == 1
        visible_BC = (self.columns_C <= self.position_1) & (self.columns_C >= self.begins_B1)
        return StepInputs(self.position_1 - self.begins_B1, visible_BC[:, None, None, :], None)

    def keep_conv(self, index: int, inputs_BSD: Tensor, state_BCD: Tensor | None) -> None:
        """See ``model.lm.DecodeState``; :meth:`leave` carries it on."""
        self.conv[index] = state_BCD

    def leave(self) -> None:
        """Carry the convolutions' states to their fixed addresses and move on by one position."""
        for j, address in enumerate(self.addresses):
            new = self.conv[j]
            if address is not None and new is not None and new is not address:
                address.copy_(new)  # a fused retrieval has moved it on in place
        self.conv = list(self.addresses)
        self.position_1 += 1


class FixedStep:
    """One decode step over fixed buffers: the body of a graph, also runnable without one."""

    def __init__(self, model: LanguageModel, cache: DecodeCache) -> None:
        self.model = model
        self.state = FixedState(cache)
        self.tokens_B1 = torch.zeros(len(cache.padding), 1, dtype=torch.int64, device=cache.device)

    def run(self) -> Tensor:
        """Logits ``(B, W)`` after ``tokens_B1``."""
        logits_BW = self.model.logits(self.tokens_B1, state=self.state)[:, -1]
        self.state.leave()
        return logits_BW


def can_capture(model: LanguageModel) -> bool:
    """Whether a step of ``model`` fits a graph: torch's grouped product asks the host in fp32."""
    experts = (module for module in model.modules() if isinstance(module, GroupedExperts))
    return all(module.up.packed_X.dtype == torch.bfloat16 for module in experts)


class GraphStepper:
    """Replays :class:`FixedStep` as a CUDA graph; see ``infer.generate.Stepper``."""

    def __init__(self, model: LanguageModel, cache: DecodeCache) -> None:
        self.model = model
        self.cache = cache
        self._step: FixedStep | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits_BW: Tensor | None = None

    def step(self, tokens_B1: Tensor) -> Tensor:
        """Logits ``(B, W)`` of the token after these."""
        if self._step is None or self.cache.length >= self._step.state.capacity:
            self._capture()
        assert self._step is not None and self._graph is not None and self._logits_BW is not None
        self._step.tokens_B1.copy_(tokens_B1)
        self._graph.replay()
        for kv in self.cache.kv:
            kv.length += 1
        for j, address in enumerate(self._step.state.addresses):
            self.cache.conv[j] = address
        return self._logits_BW

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these sequences; the next step captures anew."""
        self.cache.select(rows)
        self._step = None

    def _capture(self) -> None:
        self.cache.enter(0)  # zeroes the convolutions' padding, which a graph cannot
        for kv in self.cache.kv:
            assert kv.keys_BACK is not None
            kv.reserve(kv.length + 1, kv.keys_BACK)
        self._step = FixedStep(self.model, self.cache)
        state = self._step.state
        saved = [None if address is None else address.clone() for address in state.addresses]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_STEPS):
                self._step.run()
                self._rewind(saved)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits_BW = self._step.run()
        self._rewind(saved)

    def _rewind(self, saved: list[Tensor | None]) -> None:
        """Undo a step that only warmed up; what it wrote at the position is overwritten later."""
        assert self._step is not None
        state = self._step.state
        state.position_1.fill_(self.cache.length)
        for address, before in zip(state.addresses, saved):
            if address is not None and before is not None:
                address.copy_(before)
