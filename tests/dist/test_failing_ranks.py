"""A rank that fails, dies or hangs, a launcher that dies: the job ends, says why, leaves nothing.

Real ranks under the launcher; ``ultramem_ds.testing.faults`` is the command line with the fault.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.conftest import VOCAB_SIZE
from tests.dist.launching import ROOT, environment
from ultramem_ds.utils.processes import wait_until

pytestmark = pytest.mark.dist

SMALL = (
    "model.hidden_size=32 model.inner_size=64 model.seq_len=64 model.num_layers=2 "
    f"train.global_batch_size=8 model.vocab_size={VOCAB_SIZE} train.micro_batch_size=2 "
    "train.max_steps=6 train.eval_sequences=8"
).split()
MARK = "ULTRAMEM_TEST_MARK"


class Job:
    """A launched run; its processes, children too, are known by a mark."""

    def __init__(
        self,
        data: Path,
        run_dir: Path,
        *overrides: str,
        faults: str = "",
        preset: str = "dense",
        ranks: int = 2,
    ) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        self.mark = f"{run_dir}-{port}"
        self.run_dir = run_dir
        command = [sys.executable, "-m", "deepspeed.launcher.runner"]
        command += ["--num_gpus", str(ranks), "--no_local_rank"]
        command += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
        command += ["--module", "ultramem_ds.testing.faults", "train", "--preset"]
        command += [f"{preset}-debug", "--data", str(data), "--run-dir", str(run_dir)]
        self.log = run_dir.with_suffix(".log")
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                [*command, *SMALL, *overrides],
                env=environment(ULTRAMEM_FAULTS=faults, **{MARK: self.mark}),
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def processes(self) -> list[psutil.Process]:
        """All live processes of the job."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != "zombie":
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def wait(self, timeout_s: float = 120.0) -> tuple[int, str]:
        """Exit code and output; nothing of the job may be left 15 s after its end."""
        code = self.process.wait(timeout_s)
        ended = wait_until(lambda: not self.processes(), 15.0)
        left = [(p.pid, p.cmdline()) for p in self.processes()]
        for process in self.processes():
            process.kill()
        assert ended, left
        return code, self.log.read_text()

    def faults(self) -> list[dict[str, object]]:
        """The run's ``faults.jsonl``."""
        lines = (self.run_dir / "faults.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def pid(self, rank: int) -> int:
        """Process of a rank, once it has signed the roster."""
        path = self.run_dir / "ranks" / f"rank-{rank:05d}.json"
        assert wait_until(lambda: self.step(rank) > 0, 60.0), self.log.read_text()
        return int(json.loads(path.read_text())["pid"])

    def step(self, rank: int) -> int:
        """The step that a rank was at when it last signed."""
        path = self.run_dir / "ranks" / f"rank-{rank:05d}.json"
        return int(json.loads(path.read_text())["step"]) if path.exists() else 0


def segments() -> set[str]:
    return set(os.listdir("/dev/shm"))


def test_exception_on_one_rank(prepared: Path, tmp_path: Path) -> None:
    before = segments()
    job = Job(prepared, tmp_path / "run", faults="raise@3:1:backward")
    code, output = job.wait()
    assert code == 1
    assert "rank 1 failed at step 3, phase backward: RuntimeError: injected failure" in output
    assert output.count("Traceback") == 1  # the one that helps; rank 0 only lost a peer
    assert [(f["kind"], f["rank"], f["step"], f["phase"]) for f in job.faults()] == [
        ("failure", 1, 3, "backward")
    ]
    assert segments() <= before


def test_expected_error_is_one_line(prepared: Path, tmp_path: Path) -> None:
    job = Job(prepared, tmp_path / "run", faults="badvalue@2:1:data")
    code, output = job.wait()
    assert code == 2
    assert "error: rank 1 failed at step 2, phase data: ValueError: injected bad value" in output
    assert "Traceback" not in output


def test_killed_rank_is_named(prepared: Path, tmp_path: Path) -> None:
    job = Job(prepared, tmp_path / "run", "train.max_steps=100000")
    pid = job.pid(1)
    began = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    code, output = job.wait(40.0)
    assert time.monotonic() - began < 30
    assert code != 0
    assert f"rank 1 (pid {pid}" in output and "died" in output and "rank 0 lost its peers" in output


def test_frozen_rank_is_found_by_the_watchdog(prepared: Path, tmp_path: Path) -> None:
    job = Job(prepared, tmp_path / "run", "train.watchdog_s=3", faults="freeze@3:1")
    code, output = job.wait()
    assert code != 0
    assert "watchdog: rank 0 has been at step 3, phase" in output
    assert "when last seen, no answer (stopped)" in output and "killed rank 1" in output
    stacks = output[output.index("Python stacks of rank 0") :]
    assert "in train_step" in stacks  # where rank 0 waits
    assert [fault["kind"] for fault in job.faults()] == ["hang"]


@pytest.mark.parametrize("which", ["deepspeed.launcher.runner", "deepspeed.launcher.launch"])
def test_ranks_end_without_their_launcher(which: str, prepared: Path, tmp_path: Path) -> None:
    job = Job(prepared, tmp_path / "run", "train.max_steps=100000")
    job.pid(0)
    killed = [p for p in job.processes() if which in p.cmdline()]
    assert len(killed) == 1
    killed[0].kill()
    job.process.wait(20.0)
    gone: Callable[[], bool] = lambda: not job.processes()  # noqa: E731
    assert wait_until(gone, 30.0), [p.cmdline() for p in job.processes()]
    assert "its launcher is gone" in job.log.read_text()
    assert {fault["kind"] for fault in job.faults()} == {"orphaned"}
