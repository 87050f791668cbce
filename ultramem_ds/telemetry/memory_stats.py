"""When the memory layers' statistics are sampled, summed over ranks and reported."""

from __future__ import annotations

from types import MappingProxyType

import torch

from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.model.memory.layer import MemoryLayer
from ultramem_ds.model.memory.stats import StatsWindow
from ultramem_ds.sharding.comm import Comm
from ultramem_ds.telemetry.update_sizes import Readers, UpdateSizes


class MemoryStatistics:
    """The statistics of ``model/memory/stats`` over windows of ``memory.stats_every`` steps.

    Args:
        model: its memory layers get their observers here.
        comm: the group whose tokens are counted together.
        device: where the model runs.
        readers: values and keys whose sizes and updates are measured, see :class:`UpdateSizes`.
    """

    def __init__(
        self,
        model: LanguageModel,
        comm: Comm,
        device: torch.device,
        readers: Readers = MappingProxyType({}),
    ) -> None:
        memory = model.config.memory
        self.every = memory.stats_every if len(model.memories) else 0
        self.comm = comm
        self.device = device
        self.updates = UpdateSizes(readers)
        self.window = StatsWindow(memory, len(model.memories), device)
        if self.every:
            for layer, observer in zip(model.memories, self.window.layers):
                assert isinstance(layer, MemoryLayer)
                layer.observer = observer

    def _due(self, step: int) -> bool:
        return bool(self.every) and (step + 1) % self.every == 0

    def before_step(self, step: int) -> None:
        """Call on every rank before optimizer step ``step`` (counted from 0)."""
        if self._due(step):
            self.window.sample()
            self.updates.before_step()

    def after_step(self, step: int) -> dict[str, float]:
        """Call on every rank after it; the window's numbers where one ends, else nothing."""
        if not self._due(step):
            return {}
        summed = [self.comm.all_reduce_(tensor) for tensor in self.window.tensors()]
        numbers = self.window.summaries(summed)
        numbers |= self.updates.numbers(self.comm.all_reduce_(self.updates.sums(self.device)))
        self.window.reset()
        return numbers
