"""The ``study`` verb with real runs: interrupted, repeated, with a row that fails; and SLURM."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import RUN_OVERRIDES
from tests.dist.launching import ROOT, environment, run_verb

STEPS = 250  # seconds, so that a signal comes before the end
OVERRIDES = [o for o in RUN_OVERRIDES if not o.startswith(("train.max_steps", "memory."))]
TEXT = f"""
title: Interrupted
question: Does it go on?
seeds: [0]
tokens: [{STEPS * 4 * 32}]
overrides: [{", ".join([*OVERRIDES, "train.save_every=100", "train.eval_every=100"])}]
rows:
  - {{name: dense, preset: dense-debug}}
  - {{name: broken, preset: dense-debug, overrides: [model.vocab_size=100]}}
"""


@pytest.mark.slow
@pytest.mark.dist
def test_interrupted_study_goes_on_and_a_failing_row_stops_nothing(prepared, tmp_path):
    study, output = tmp_path / "small.yaml", tmp_path / "out"
    study.write_text(TEXT)
    arguments = ["study", str(study), "--data", str(prepared), "--output", str(output)]
    run_dir = output / "runs" / f"dense-steps{STEPS}-seed0"
    process = subprocess.Popen(
        [sys.executable, "-m", "ultramem_ds", *arguments],
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 130, said
    assert list((run_dir / "checkpoints").iterdir()), "the run in progress has saved"
    assert not (run_dir / "summary.json").exists(), "it ended before the signal came"

    result = run_verb(*arguments)
    assert result.returncode == 1, result.stderr
    assert f"failed: broken-steps{STEPS}-seed0: exit code 2" in result.stderr
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))
    assert "resuming" in (run_dir / "console.log").read_text()
    assert not (run_dir / "checkpoints").exists()
    page = (output / "small.md").read_text()
    assert "1 of 2 runs are finished" in page and "| dense" in page

    result = run_verb(*arguments, "--dry-run")
    assert result.returncode == 0
    assert [line.split()[1] for line in result.stdout.splitlines()] == ["finished", "0.03"]


def test_unfinished_runs_are_handed_to_slurm(prepared, tmp_path):
    """A stand-in for sbatch writes down what it is given; a refusal ends the command with 2."""
    study, output, bin_dir = tmp_path / "small.yaml", tmp_path / "out", tmp_path / "bin"
    study.write_text(TEXT)
    bin_dir.mkdir()
    sbatch = bin_dir / "sbatch"
    sbatch.write_text('#!/bin/sh\nprintf "%s\\n" "$@" >> "$SAID"\necho Submitted batch job 7\n')
    sbatch.chmod(0o755)
    arguments = ["study", str(study), "--data", str(prepared), "--output", str(output)]
    submit = "--submit=--nodes=1 --time=4:00:00"
    extra = {"PATH": f"{bin_dir}:{os.environ['PATH']}", "SAID": str(tmp_path / "said")}
    result = run_verb(*arguments, submit, **extra)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        f"dense-steps{STEPS}-seed0: Submitted batch job 7",
        f"broken-steps{STEPS}-seed0: Submitted batch job 7",
    ]
    said = (tmp_path / "said").read_text().splitlines()
    first = said[: said.index(f"--job-name=broken-steps{STEPS}-seed0")]
    assert first[0] == f"--job-name=dense-steps{STEPS}-seed0"
    assert first[3:6] == ["--nodes=1", "--time=4:00:00", "launch/slurm.sh"]
    assert first[6:9] == ["train", "--preset", "dense-debug"]
    assert first[-2:] == [f"train.max_steps={STEPS}", "train.seed=0"]
    sbatch.write_text("#!/bin/sh\necho no such partition >&2\nexit 1\n")
    result = run_verb(*arguments, submit, **extra)
    assert (result.returncode, "no such partition" in result.stderr) == (2, True)
