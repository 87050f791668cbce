"""When the gradients' signal-to-noise is taken, summed over ranks and reported."""

from __future__ import annotations

import sys

import torch

from ultramem_ds.optim.gradient_signal import share
from ultramem_ds.sharding.comm import Comm
from ultramem_ds.zero.gradient_signal import GradientSignals


class GradientStatistics:
    """``grad_signal/GROUP`` after every ``every``-th optimizer step: what share of it is signal.

    Where it cannot be had, rank 0 says so once, on stderr.

    Args:
        signals: of this rank's moments.
        comm: all ranks.
        device: where the model runs.
        every: optimizer steps between them; 0 = never.
    """

    def __init__(
        self, signals: GradientSignals, comm: Comm, device: torch.device, every: int
    ) -> None:
        self.signals = signals
        self.comm = comm
        self.device = device
        self.every = 0 if signals.obstacle else every
        if every and signals.obstacle and comm.rank == 0:
            print(
                f"no signal share of gradients (grad_signal/*) in this run: {signals.obstacle}",
                file=sys.stderr,
                flush=True,
            )

    def after_step(self, step: int) -> dict[str, float]:
        """Call on every rank after optimizer step ``step`` (counted from 0); mostly nothing.

        A group without any gradient, or with less than two updates, has no number.
        """
        if not self.every or (step + 1) % self.every:
            return {}
        summed = self.comm.all_reduce_(self.signals.sums(self.device)).tolist()
        return {
            f"grad_signal/{group}": share(signal, power)
            for group, (signal, power) in zip(self.signals.groups, summed)
            if power > 0
        }
