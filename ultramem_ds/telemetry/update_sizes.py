"""How large values and keys are, and how far one optimizer step moves them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

MAX_ELEMENTS = 1 << 16  # looked at per tensor and rank

Readers = Mapping[str, Callable[[], Tensor]]


class UpdateSizes:
    """Compares evenly spread elements of some tensors before and after a step.

    Args:
        readers: name -> returns this rank's piece of a parameter, any shape; it may move. Rows of
            a table that the step did not touch count too: what is measured is the whole tensor.
    """

    def __init__(self, readers: Readers) -> None:
        self._readers = readers
        self._before: dict[str, Tensor] = {}

    def before_step(self) -> None:
        """Remember the elements; call right before the step."""
        self._before = {name: _spread(read()).clone() for name, read in self._readers.items()}

    def sums(self, device: torch.device) -> Tensor:
        """(tensors, 3) float64 on ``device``: number, sum of squares, sum of squared changes."""
        rows = []
        for name, read in self._readers.items():
            now, before = _spread(read()).double(), self._before[name].double()
            number = torch.tensor(float(now.numel()), dtype=torch.float64, device=now.device)
            rows.append(torch.stack([number, now.square().sum(), (now - before).square().sum()]))
        if not rows:
            return torch.zeros(0, 3, dtype=torch.float64, device=device)
        return torch.stack(rows).to(device)

    def numbers(self, summed: Tensor) -> dict[str, float]:
        """From ``sums`` added over ranks: ``NAME_rms``, and ``NAME_update`` as a share of it."""
        result = {}
        for name, (number, square, change) in zip(self._readers, summed.tolist()):
            result[f"{name}_rms"] = (square / number) ** 0.5
            result[f"{name}_update"] = (change / square) ** 0.5 if square else 0.0
        return result


def _spread(tensor: Tensor) -> Tensor:
    """At most ``MAX_ELEMENTS`` elements; an odd stride, so that every column has its turn."""
    flat = tensor.detach().reshape(-1)
    stride = -(-flat.numel() // MAX_ELEMENTS)
    return flat[:: stride | 1]
