"""Sums for the gradient's signal-to-noise, over the moments that this rank holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ultramem_ds.config.schema import OptimConfig
from ultramem_ds.optim.gradient_signal import flat_signal_and_power
from ultramem_ds.zero.deepspeed_import import deepspeed
from ultramem_ds.zero.experts import is_padding
from ultramem_ds.zero.state import Zero3State, Zero12State
from ultramem_ds.zero.tables import Zero3Tables

GROUPS = ("tables", "keys", "queries", "experts", "dense")
_GROUP_OF_INIT = {"memory_keys": "keys", "memory_query": "queries", "memory_conv": "queries"}


def group_of(param: nn.Parameter) -> str:
    """The group that a parameter's gradient counts in, by its tags."""
    if getattr(param, "role", None) == "table":
        return "tables"
    if deepspeed.moe.utils.is_moe_param(param):
        return "experts"
    return _GROUP_OF_INIT.get(getattr(param, "init", ""), "dense")


class GradientSignals:
    """Signal and power of the gradients by group, see :mod:`ultramem_ds.optim.gradient_signal`.

    Every element of the model counts once over all ranks, those of tables once per copy.

    Args:
        module: the model inside the engine.
        state: where DeepSpeed keeps the moments; None where they are not in memory.
        canonical: from the module's parameter names to those of ``state``.
        tables: the value tables; None without any.
        optim: Adam's betas.

    Attributes:
        groups: the model's, those of ``GROUPS`` that it has: the same on all ranks.
        obstacle: why there is nothing to say, in words; empty where there is.
    """

    def __init__(
        self,
        module: nn.Module,
        state: Zero12State | Zero3State | None,
        canonical: Callable[[str], str],
        tables: Zero3Tables | None,
        optim: OptimConfig,
    ) -> None:
        named = list(module.named_parameters())
        self._group_of = {canonical(n): group_of(p) for n, p in named if not is_padding(p)}
        found = {group_of(p) for _, p in named}  # padding too: some rank may hold nothing else
        self.groups = tuple(group for group in GROUPS if group in found)
        self._state = state
        self._tables = tables
        self._betas = (optim.beta1, optim.beta2)
        self.obstacle = ""
        if state is None:
            self.obstacle = "the optimizer's moments are on NVMe"
        elif optim.beta1 == 0:
            self.obstacle = "optim.beta1=0 averages nothing"

    def sums(self, device: torch.device) -> Tensor:
        """(groups, 2) float64 on ``device``: estimates of signal and power on this rank."""
        assert self._state is not None
        sums: dict[str, Any] = {group: torch.zeros(2, dtype=torch.float64) for group in self.groups}
        if self._tables is not None:
            sums["tables"] = self._tables.signal_and_power()
        moments = [self._state.moments(index) for index in range(self._state.num_buffers)]
        for piece in self._state.pieces():
            held = moments[piece.buffer]
            if held is None:
                continue
            inside = slice(piece.offset, piece.offset + piece.block.numel)
            group = self._group_of[piece.name]
            sums[group] = sums[group].to(held.avg.device) + flat_signal_and_power(
                held.avg[inside], held.avg_sq[inside], held.updates, *self._betas
            )
        return torch.stack([sums[group].to(device) for group in self.groups])
