"""Bad steps: what is a spike, when a run gives up, what a resumed run remembers."""

import math
from dataclasses import replace

import pytest

from ultramem_ds.config.presets import preset
from ultramem_ds.optim.decision import Decision
from ultramem_ds.watch.guards import HISTORY, StepGuard, TooManyBadStepsError


def guard(**train) -> StepGuard:
    return StepGuard(replace(preset("dense-debug").train, **train), clip_grad=1.0)


def decide(judged: StepGuard, norm: float) -> Decision:
    decision = judged.judge(norm)
    judged.remember(norm)
    return decision


def test_off_takes_every_finite_norm() -> None:
    judged = guard(grad_spike="off")
    assert all(decide(judged, norm).apply for norm in [1.0] * 50 + [1e9])


def test_a_spike_stands_out_from_the_history() -> None:
    judged = guard(grad_spike="skip", grad_spike_sigma=4.0)
    assert all(decide(judged, 1.0).apply for _ in range(20))
    # Constant: the spread is taken as 5% of the mean, so the limit is 1 + 4 * 0.05.
    assert judged.limit() == pytest.approx(1.2)
    assert decide(judged, 1.19).apply
    spike = decide(judged, 5.0)
    assert not spike.apply and spike.spike and spike.grad_norm == 5.0
    clipped = guard(grad_spike="clip", grad_spike_sigma=4.0)
    for _ in range(20):
        decide(clipped, 0.5)
    decision = decide(clipped, 9.0)
    assert decision.apply and decision.spike and decision.clip_grad == pytest.approx(0.6)
    assert decision.grad_scale == pytest.approx(0.6 / 9.0)


def test_young_history_knows_no_spike() -> None:
    judged = guard(grad_spike="skip")
    assert decide(judged, 0.1).apply and decide(judged, 1e6).apply


def test_a_lasting_change_of_level_is_followed() -> None:
    judged = guard(grad_spike="skip", grad_spike_sigma=6.0)
    for _ in range(HISTORY):
        decide(judged, 1.0)
    refused = 0
    while not decide(judged, 3.0).apply:
        refused += 1
        assert refused < HISTORY
    assert refused > 0


def test_so_many_in_a_row_end_the_run_with_a_report() -> None:
    counted = guard(max_bad_steps=2)
    bad = Decision(math.inf, False, 0.0)
    good = Decision(1.0, True, 1.0)
    for step, decision in enumerate([bad, good, bad], 1):
        counted.review(step, decision, 2.0, ((8 * step, 8 * step + 8),), {})
        counted.check()
    reviewed = counted.review(4, bad, math.nan, ((32, 40),), {})
    assert reviewed is not None and reviewed.reason == "loss not finite"
    with pytest.raises(TooManyBadStepsError) as stop:
        counted.check()
    assert [step.step for step in stop.value.steps] == [3, 4]
    for part in ("samples 24:32", "samples 32:40", "gradient not finite", "--skip-samples"):
        assert part in str(stop.value)
    assert counted.bad_steps == 3


def test_never_stops_with_zero() -> None:
    counted = guard(max_bad_steps=0)
    for step in range(1, 300):
        counted.review(step, Decision(math.inf, False, 0.0), 2.0, (), {})
        counted.check()
    assert counted.bad_steps == 299 and len(counted.recent) == HISTORY


def test_state_survives_a_restart() -> None:
    first = guard(grad_spike="skip")
    for norm in range(1, 40):
        decide(first, float(norm))
    first.review(40, Decision(math.inf, False, 0.0), math.nan, ((1, 2), (4, 5)), {})
    second = guard(grad_spike="skip")
    second.load_state(first.state())
    assert second.state() == first.state()
    assert second.limit() == first.limit()
    assert math.isnan(second.recent[0].loss) and second.recent[0].samples == ((1, 2), (4, 5))
