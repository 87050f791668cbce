"""How much of a gradient is signal, from Adam's moments: no pass over gradients of its own.

A gradient element is a mean mu plus noise of variance s2, independent from step to step. After t
updates Adam's bias-corrected moments have the expectations

    E[m_hat^2] = mu^2 + f(t) s2,    E[v_hat] = mu^2 + s2,
    f(t) = sum w_i^2 / (sum w_i)^2 = (1 - b1) / (1 + b1) * (1 + b1^t) / (1 - b1^t),

with the weights ``w_i = b1^(t - i)`` of an exponential average: f(1) = 1, where one gradient tells
nothing, and f falls to (1 - b1) / (1 + b1). So ``(m_hat^2 - f v_hat) / (1 - f)`` estimates mu^2
without bias. Summed over elements and divided by the sum of v_hat it is the *signal share*
``|mu|^2 / (|mu|^2 + s2)``, 0 for noise and 1 for a constant gradient; the gradient signal-to-noise
ratio ``|mu|^2 / s2`` is share / (1 - share).

Letters: N rows, V columns; a flat buffer is one row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 20  # elements that are converted to float64 at a time


class MomentSums(NamedTuple):
    """Moments of some rows, summed over columns: float64."""

    squares_N: Tensor  # of the first moment's squares
    avg_sq_N: Tensor  # of the second moment
    updates_N: Tensor  # that the row's moments have seen


def noise_floor(beta1: float, updates: Tensor) -> Tensor:
    """f(t) of the module, for float64 ``updates`` t of at least 1."""
    faded = beta1**updates
    return (1 - beta1) / (1 + beta1) * (1 + faded) / (1 - faded)


def signal_and_power(sums: MomentSums, beta1: float, beta2: float) -> Tensor:
    """Estimates of ``|mu|^2`` and ``|mu|^2 + s2``, summed over rows: (2,) float64.

    The first may be negative. Rows of fewer than two updates tell nothing and are left out of both.
    """
    updates_N = sums.updates_N.double()
    floor_N = noise_floor(beta1, updates_N.clamp(min=2))
    square_N = sums.squares_N / (1 - beta1**updates_N) ** 2
    power_N = sums.avg_sq_N / (1 - beta2**updates_N)
    signal_N = (square_N - floor_N * power_N) / (1 - floor_N)
    both_2N = torch.stack([signal_N, power_N])
    return torch.where(updates_N > 1, both_2N, 0.0).sum(1)


def row_sums(avg_NV: Tensor, avg_sq_NV: Tensor, updates_N: Tensor) -> Iterator[MomentSums]:
    """Sums of all rows, as many rows at a time as ``CHUNK`` allows."""
    num_rows, width = avg_NV.shape
    step = max(1, CHUNK // width)
    for first in range(0, num_rows, step):
        rows = slice(first, min(num_rows, first + step))
        squares_N = avg_NV[rows].double().square().sum(1)
        yield MomentSums(squares_N, avg_sq_NV[rows].double().sum(1), updates_N[rows])


def flat_signal_and_power(
    avg: Tensor, avg_sq: Tensor, updates: int, beta1: float, beta2: float
) -> Tensor:
    """:func:`signal_and_power` of flat moments that have all seen as many updates."""
    pairs = zip(avg.split(CHUNK), avg_sq.split(CHUNK))
    sums_2 = torch.zeros(2, dtype=torch.float64, device=avg.device)
    for part, part_sq in pairs:
        sums_2 += torch.stack([part.double().square().sum(), part_sq.double().sum()])
    squares_1, avg_sq_1 = sums_2.split(1)
    updates_1 = torch.full_like(squares_1, updates)
    return signal_and_power(MomentSums(squares_1, avg_sq_1, updates_1), beta1, beta2)


def share(signal: float, power: float) -> float:
    """The signal share of summed estimates; noise that happens to be negative is nothing."""
    return max(0.0, signal / power)
