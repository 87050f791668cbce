"""One trial of the fault campaign (``make chaos`` runs all of it)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ultramem_ds.testing.chaos import main

pytestmark = pytest.mark.dist


@pytest.mark.slow
def test_short_campaign(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faults = ["flipped checkpoint"]
    arguments = ["--trials", "1", "--work", str(tmp_path / "work")]
    arguments += ["--json", str(tmp_path / "trials.json"), "--preset", "ultramem-debug"]
    for fault in faults:
        arguments += ["--fault", fault]
    code = main(arguments)
    trials = json.loads((tmp_path / "trials.json").read_text())
    assert code == 0, trials
    assert [trial["fault"] for trial in trials] == faults
    assert all(trial["identical"] and trial["starts"] >= 2 for trial in trials)
    assert "same series" in capsys.readouterr().out
