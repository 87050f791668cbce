"""Going back and around bad data is what a person would do with ``--skip-samples``.

One process, the command line: a run that rolls back by itself, and one that is stopped at the same
checkpoint and started again with the samples named. The same series, to the last digit.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import VOCAB_SIZE
from tests.dist.launching import ROOT, environment
from ultramem_ds.testing.trials import difference, series
from ultramem_ds.testing.launched import faults_of
from ultramem_ds.checkpoint.directory import latest_checkpoint, read_trainer_state

pytestmark = pytest.mark.dist

ARGUMENTS = (
    "--preset ultramem-debug model.hidden_size=32 model.inner_size=64 model.num_layers=2 "
    f"model.seq_len=64 model.vocab_size={VOCAB_SIZE} model.dropout=0.1 train.global_batch_size=8 "
    "train.micro_batch_size=4 train.max_steps=8 train.save_every=2 train.eval_sequences=8 "
    "train.max_bad_steps=2 train.rollback=true memory.placement=1:2 memory.knum=25 "
    "memory.value_dim=16 memory.top_m=4 memory.stats_every=3"
).split()


def run(data: Path, run_dir: Path, *more: str, **extra: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ultramem_ds.testing.faults", "train"]
    command += ["--data", str(data), "--run-dir", str(run_dir), *ARGUMENTS, *more]
    return subprocess.run(
        command, env=environment(**extra), cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_rollback_equals_skipping_by_hand(prepared: Path, tmp_path: Path) -> None:
    by_itself, by_hand = tmp_path / "itself", tmp_path / "hand"
    rolled = run(prepared, by_itself, ULTRAMEM_FAULTS="nan@5-6:0", ULTRAMEM_FAULTS_DONE=str(tmp_path))
    assert rolled.returncode == 0, rolled.stderr[-3000:]
    kinds = [event["kind"] for event in faults_of(by_itself)]
    assert kinds == ["bad step", "bad step", "rollback"]
    # Steps 5 and 6 of 8 samples each, back to the checkpoint of step 4.
    assert "rolling back to step 4" in rolled.stderr and "over samples 32:48" in rolled.stderr

    assert run(prepared, by_hand, "train.stop_at_step=4").returncode == 0
    refused = run(prepared, by_hand, "--skip-samples", "30:48")
    assert refused.returncode == 2
    assert "already trained on samples 30:32; the next one is 32" in refused.stderr
    skipped = run(prepared, by_hand, "--skip-samples", "32:40", "--skip-samples", "40:48")
    assert skipped.returncode == 0, skipped.stderr[-3000:]

    assert difference(series(by_hand), series(by_itself)) == ""
    assert [record["step"] for record in series(by_itself)] == list(range(1, 9))
    for run_dir in (by_itself, by_hand):
        latest = latest_checkpoint(run_dir)
        assert latest is not None
        assert read_trainer_state(latest).skipped_samples == [[32, 48]]
        # Statistics of a real run: memory.stats_every=3.
        third = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[2])
        for name in ("output_share", "value_rms", "value_update", "key_rms", "key_update"):
            assert 0 < third[f"layer_0/{name}"] < 100, name


def test_a_second_rollback_remembers_the_first(prepared: Path, tmp_path: Path) -> None:
    """Both go to the checkpoint of step 4, which knows of neither region."""
    run_dir = tmp_path / "run"
    faults = "nan@5-6:0 nangrad@7-8:0"
    rolled = run(
        prepared, run_dir, "train.save_every=4",
        ULTRAMEM_FAULTS=faults, ULTRAMEM_FAULTS_DONE=str(tmp_path),
    )  # fmt: skip
    assert rolled.returncode == 0, rolled.stderr[-3000:]
    assert [e["kind"] for e in faults_of(run_dir)] == ["bad step", "bad step", "rollback"] * 2
    assert rolled.stderr.count("rolling back to step 4") == 2
    latest = latest_checkpoint(run_dir)
    assert latest is not None
    assert read_trainer_state(latest).skipped_samples == [[32, 48], [64, 80]]


def test_too_many_bad_steps_stop_with_a_report(prepared: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    stopped = run(prepared, run_dir, ULTRAMEM_FAULTS="nangrad@1-2:0")
    assert stopped.returncode == 2, stopped.stderr[-3000:]
    assert "Traceback" not in stopped.stderr
    for part in ("2 steps in a row were skipped", "gradient not finite", "samples 8:16"):
        assert part in stopped.stderr
    assert "no checkpoint" in stopped.stderr  # rollback was asked for: nothing to go back to
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["skipped"] for record in records] == ["gradient not finite"] * 2
    assert records[1]["bad_steps"] == 2 and records[1]["grad_norm"] is None
