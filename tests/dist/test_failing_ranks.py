"""A rank that fails, dies or hangs, a launcher that dies: the job ends, says why, leaves nothing.

Real ranks under the launcher; ``ultramem_ds.testing.faults`` is the command line with the fault.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import VOCAB_SIZE
from ultramem_ds.testing.launched import Job, faults_of
from ultramem_ds.checkpoint.directory import latest_checkpoint

pytestmark = pytest.mark.dist

SMALL = (
    "model.hidden_size=32 model.inner_size=64 model.seq_len=64 model.num_layers=2 "
    f"train.global_batch_size=8 model.vocab_size={VOCAB_SIZE} train.micro_batch_size=2 "
    "train.max_steps=6 train.eval_sequences=8"
).split()


def start(
    data: Path, run_dir: Path, *overrides: str, preset: str = "dense-debug", **options: Any
) -> Job:
    arguments = ["--preset", preset, "--data", str(data), "--run-dir", str(run_dir)]
    return Job([*arguments, *SMALL, *overrides], run_dir, **options)


def finish(job: Job, timeout_s: float = 120.0) -> tuple[int, str]:
    """Exit code and output; nothing of the job may be left a little after its end."""
    ended = job.ended(timeout_s)
    assert ended, (job.kill(), job.output()[-3000:])
    return job.process.returncode, job.output()


def segments() -> set[str]:
    return set(os.listdir("/dev/shm"))


def test_exception_on_one_rank(prepared: Path, tmp_path: Path) -> None:
    before = segments()
    job = start(prepared, tmp_path / "run", faults="raise@3:1:backward")
    code, output = finish(job)
    assert code == 1
    assert "rank 1 failed at step 3, phase backward: RuntimeError: injected failure" in output
    assert output.count("Traceback") == 1  # the one that helps; rank 0 only lost a peer
    assert [(f["kind"], f["rank"], f["step"], f["phase"]) for f in faults_of(job.run_dir)] == [
        ("failure", 1, 3, "backward")
    ]
    assert segments() <= before


def test_expected_error_is_one_line(prepared: Path, tmp_path: Path) -> None:
    job = start(prepared, tmp_path / "run", faults="badvalue@2:1:data")
    code, output = finish(job)
    assert code == 2
    assert "error: rank 1 failed at step 2, phase data: ValueError: injected bad value" in output
    assert "Traceback" not in output


def test_killed_rank_is_named(prepared: Path, tmp_path: Path) -> None:
    job = start(prepared, tmp_path / "run", "train.max_steps=100000")
    pid = job.pid_at_step(1, 1)
    assert pid, job.output()[-3000:]
    began = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    code, output = finish(job, 40.0)
    assert time.monotonic() - began < 30
    assert code != 0
    assert f"rank 1 (pid {pid}" in output and "died" in output, output[-3000:]
    assert "rank 0 lost its peers" in output


def test_frozen_rank_is_found_by_the_watchdog(prepared: Path, tmp_path: Path) -> None:
    job = start(prepared, tmp_path / "run", "train.watchdog_s=3", faults="freeze@3:1")
    code, output = finish(job)
    assert code != 0
    assert "watchdog: rank 0 has been at step 3, phase" in output
    assert "when last seen, no answer (stopped)" in output and "killed rank 1" in output
    stacks = output[output.index("Python stacks of rank 0") :]
    assert "in train_step" in stacks  # where rank 0 waits
    assert [fault["kind"] for fault in faults_of(job.run_dir)] == ["hang"]


def test_ranks_save_and_end_without_their_launcher(prepared: Path, tmp_path: Path) -> None:
    job = start(prepared, tmp_path / "run", "train.max_steps=100000")
    assert job.pid_at_step(0, 1)
    victims = [p for p in job.processes() if "ultramem_ds.launcher" in p.cmdline()]
    assert len(victims) == 1
    victims[0].kill()
    assert job.ended(40.0), (job.kill(), job.output()[-3000:])
    # What it says goes nowhere: the console was the launcher's.
    assert "orphaned" in {fault["kind"] for fault in faults_of(job.run_dir)}
    assert latest_checkpoint(job.run_dir) is not None  # it had none before
