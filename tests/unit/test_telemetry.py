"""Instruments of a step: utilisation, parts of the norm, times and traffic between steps."""

from __future__ import annotations

import time

import pytest
import torch

from ultramem_ds.config.load import load_config
from ultramem_ds.model.accounting import training_flops_per_token
from ultramem_ds.sharding.execution import LOOKUP, ClockedExecutor, InlineExecutor, ThreadExecutor
from ultramem_ds.telemetry.peak_flops import measure_matmul, peak_flops_per_s
from ultramem_ds.telemetry.phases import Phases

CPU = torch.device("cpu")


def test_training_flops_by_hand() -> None:
    # dense-debug: D 128, inner 512, L 4, S 128, vocabulary 4096.
    matrices = 4 * (4 * 128 * 128 + 2 * 128 * 512)
    attention = 4 * 2 * 128 * 128  # scores and sums over S/2 positions, 2 FLOPs each
    assert training_flops_per_token(load_config("dense-debug")) == 3 * (
        2 * matrices + 2 * 128 * 4096 + attention
    )
    memory = load_config("ultramem-debug", ["memory.top_m=4"])
    more = load_config("ultramem-debug", ["memory.top_m=8"])
    pooled = 2 * 4 * memory.memory.num_heads * memory.memory.value_dim * 2  # K V twice, two layers
    assert training_flops_per_token(more) - training_flops_per_token(memory) == 3 * pooled


def test_peak_is_told_or_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, source = peak_flops_per_s(CPU, "fp32")
    assert measured > 1e8 and "measured" in source
    assert measure_matmul(CPU, "fp32", size=64) > 1e7
    monkeypatch.setenv("ULTRAMEM_PEAK_TFLOPS", "2.5")
    assert peak_flops_per_s(CPU, "fp32") == (2.5e12, "ULTRAMEM_PEAK_TFLOPS")


@pytest.mark.parametrize("inner", [InlineExecutor, ThreadExecutor])
def test_waiting_for_a_lookup_is_on_the_clock(inner: type) -> None:
    phases = Phases()

    def work() -> torch.Tensor:
        time.sleep(0.05)
        return torch.ones(1)

    executor = ClockedExecutor(inner(), phases)
    with phases("forward"):
        assert executor.submit(work).result().item() == 1
    seconds = phases.take_seconds()
    assert seconds[LOOKUP] >= 0.045
    assert seconds["forward"] < 0.04
