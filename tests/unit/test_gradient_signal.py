"""The signal share of gradients from Adam's moments, on gradients whose share is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ultramem_ds.config.schema import OptimConfig
from ultramem_ds.optim import gradient_signal
from ultramem_ds.optim.gradient_signal import (
    MomentSums,
    flat_signal_and_power,
    noise_floor,
    share,
    signal_and_power,
)
from ultramem_ds.optim.row_adam import CatchUpRowAdam, LazyRowAdam
from ultramem_ds.telemetry.board import scalars
from ultramem_ds.telemetry.gradient_signal import GradientStatistics
from ultramem_ds.zero.gradient_signal import GradientSignals

BETAS = (0.9, 0.95)
ELEMENTS = 200_000


def adam_share(gradients: list[Tensor]) -> float:
    """Of what torch's own Adam holds after these gradients."""
    param = torch.nn.Parameter(torch.zeros_like(gradients[0]))
    adam = torch.optim.AdamW([param], betas=BETAS)
    for gradient in gradients:
        param.grad = gradient.clone()
        adam.step()
    state = adam.state[param]
    updates = int(state["step"])
    signal, power = flat_signal_and_power(
        state["exp_avg"], state["exp_avg_sq"], updates, *BETAS
    ).tolist()
    return share(signal, power)


def noise(steps: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [scale * torch.randn(ELEMENTS, generator=generator) for _ in range(steps)]


# The mean of 200,000 elements' squares is off by about 1/300 of the floor, which is 1/2 after two
# steps: 1% is several deviations at every number of steps.
@pytest.mark.parametrize("steps", [2, 3, 10, 100])
def test_noise_is_0_and_a_constant_gradient_1(steps: int) -> None:
    assert adam_share(noise(steps)) == pytest.approx(0.0, abs=0.01)
    assert adam_share([torch.full((1000,), -0.3)] * steps) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("steps", [2, 10, 100])
def test_between_them_it_is_the_share_of_the_squared_mean(steps: int) -> None:
    """Mean 1, deviation 2: 1 / (1 + 4)."""
    gradients = [1.0 + gradient for gradient in noise(steps, 2.0)]
    assert adam_share(gradients) == pytest.approx(0.2, abs=0.02)


def test_one_update_tells_nothing() -> None:
    ones = torch.ones(1, dtype=torch.float64)
    for updates in (0, 1):
        found = signal_and_power(MomentSums(ones, ones, updates * ones), *BETAS)
        assert found.tolist() == [0.0, 0.0]


def test_floor_by_its_definition() -> None:
    for updates in (1, 2, 7, 500):
        weights = 0.9 ** torch.arange(updates, dtype=torch.float64)
        expected = float(weights.square().sum() / weights.sum() ** 2)
        found = float(noise_floor(0.9, torch.tensor(float(updates), dtype=torch.float64)))
        assert found == pytest.approx(expected, rel=1e-12)
    assert found == pytest.approx(0.1 / 1.9)


def test_chunks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    average, squares = noise(2)
    whole = flat_signal_and_power(average, squares.square(), 5, *BETAS)
    monkeypatch.setattr(gradient_signal, "CHUNK", 1 << 10)
    torch.testing.assert_close(
        flat_signal_and_power(average, squares.square(), 5, *BETAS), whole, rtol=1e-12, atol=0
    )


def histories() -> tuple[list[list[int]], list[Tensor]]:
    """Row 0 in every step, row 1 never, row 2 once, row 3 in the first steps, 4 and 5 by turns."""
    generator = torch.Generator().manual_seed(1)
    touched, gradients = [], []
    for step in range(9):
        rows = [0] + [2] * (step == 4) + [3] * (step < 3) + [4 + step % 2]
        touched.append(rows)
        gradients.append(0.2 + torch.randn(len(rows), 8, generator=generator))
    return touched, gradients


def stepped(kind: type[LazyRowAdam]) -> list[float]:
    table = torch.zeros(6, 8)
    adam = kind(lambda: table, OptimConfig(beta1=BETAS[0], beta2=BETAS[1]), "reference")
    for rows, gradient in zip(*histories()):
        adam.update(torch.tensor(rows), gradient.clone(), 1e-3, 0.5)
    before = [adam.exp_avg_RV.clone(), adam.exp_avg_sq_RV.clone(), table.clone()]
    found = adam.signal_and_power().tolist()
    for was, now in zip(before, (adam.exp_avg_RV, adam.exp_avg_sq_RV, table)):
        assert torch.equal(was, now)  # looking changes nothing
    return found


def by_hand(series: list[Tensor]) -> Tensor:
    """Signal and power of one row from all gradients that it got, weights written out."""
    last = len(series) - 1
    grads = torch.stack(series).double()
    weights, squared = (
        torch.tensor([beta ** (last - i) for i in range(last + 1)], dtype=torch.float64)
        for beta in BETAS
    )
    weights, squared = weights / weights.sum(), squared / squared.sum()
    mean = (weights[:, None] * grads).sum(0)
    power = (squared[:, None] * grads.square()).sum()
    floor = weights.square().sum()
    return torch.stack([(mean.square().sum() - floor * power) / (1 - floor), power])


def test_rows_stepped_lazily_count_their_own_updates() -> None:
    touched, gradients = histories()
    rows: dict[int, list[Tensor]] = {}
    for step_rows, gradient in zip(touched, gradients):
        for row, row_gradient in zip(step_rows, gradient):
            rows.setdefault(row, []).append(0.5 * row_gradient)
    expected = sum(by_hand(series) for series in rows.values() if len(series) > 1)
    assert len(rows) == 5 and len(rows[2]) == 1
    assert stepped(LazyRowAdam) == pytest.approx(expected.tolist(), rel=1e-5)  # fp32 moments


def test_rows_that_catch_up_count_as_under_dense_adam() -> None:
    touched, gradients = histories()
    series = []
    for step_rows, gradient in zip(touched, gradients):
        series.append(torch.zeros(6, 8).index_copy_(0, torch.tensor(step_rows), 0.5 * gradient))
    expected = sum(by_hand([step[row] for step in series]) for row in range(6))
    assert stepped(CatchUpRowAdam) == pytest.approx(expected.tolist(), rel=1e-5)  # fp32 moments


class OneRank:
    """A group of one rank."""

    rank = 0

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        return tensor


class Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 2, bias=False)


@pytest.mark.parametrize(
    ("beta1", "state", "obstacle"), [(0.9, None, "NVMe"), (0.0, object(), "optim.beta1=0")]
)
def test_where_it_cannot_be_had_the_start_says_so_once(
    beta1: float, state: Any, obstacle: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def statistics(every: int) -> GradientStatistics:
        optim = OptimConfig(beta1=beta1)
        signals = GradientSignals(Tiny(), state, lambda name: name, None, optim)
        comm: Any = OneRank()
        return GradientStatistics(signals, comm, torch.device("cpu"), every)

    found = statistics(2)
    assert [found.after_step(step) for step in range(4)] == [{}] * 4
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert "grad_signal" in said.err and obstacle in said.err
    statistics(0)  # not asked for
    assert capsys.readouterr().err == ""


def test_tensorboard_has_a_group_of_its_own() -> None:
    assert scalars({"step": 3, "grad_signal/keys": 0.25}) == {"5_grad_signal/keys": 0.25}
