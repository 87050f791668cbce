"""Phase clock: exclusive times, nesting, and the phase that an exception leaves behind."""

import time

import pytest

from ultramem_ds.telemetry.phases import START, Phases


def test_inner_time_is_not_counted_for_the_outer() -> None:
    phases = Phases()
    with phases("outer"):
        with phases("inner"):
            time.sleep(0.05)
        assert phases.current == "outer"
    seconds = phases.take_seconds()
    assert seconds["inner"] >= 0.05
    assert seconds["outer"] < 0.04
    assert phases.current == START
    assert phases.take_seconds()["start"] < 0.04


def test_an_exception_leaves_the_phase_it_was_raised_in() -> None:
    phases = Phases()
    with pytest.raises(RuntimeError), phases("backward"):
        raise RuntimeError
    assert phases.current == "backward"
