"""Loss and gradient norm of every kind over 20 steps, as recorded in ``tests/golden/``.

A refactor reproduces them. ``make golden`` records them anew, which only a change of the
mathematics excuses. The tolerance is that of another machine's matrix products: on one machine
they are the same to the last digit.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tests.dist.elastic_series import KINDS, Leg, run_legs
from ultramem_ds.testing.distributed import run_ranks

pytestmark = pytest.mark.dist

GOLDEN = Path(__file__).parents[1] / "golden"
STEPS = 20
RTOL = 1e-6


def golden_legs(directory: Path) -> list[Leg]:
    overrides = (f"train.max_steps={STEPS}",)
    return [Leg(kind=kind, begin=0, end=STEPS, run_dir=directory, overrides=overrides, save=False)
            for kind in KINDS]


def test_series_are_the_recorded_ones(tmp_path: Path) -> None:
    series = run_ranks(run_legs, 2, golden_legs(tmp_path))[0]
    for kind, found in zip(KINDS, series, strict=True):
        path = GOLDEN / f"{kind}.json"
        lines = [{"loss": loss, "grad_norm": norm} for loss, norm in found]
        if os.environ.get("RECORD_GOLDEN"):
            path.write_text(json.dumps(lines, indent=1) + "\n")
        recorded = json.loads(path.read_text())
        for name in ("loss", "grad_norm"):
            torch.testing.assert_close(
                torch.tensor([line[name] for line in lines], dtype=torch.float64),
                torch.tensor([line[name] for line in recorded], dtype=torch.float64),
                rtol=RTOL,
                atol=0,
                msg=lambda text, kind=kind, name=name: f"{kind}, {name}: {text}",
            )
