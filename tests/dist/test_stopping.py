"""Signals and kills through the launch script: real processes, and the series goes on exactly."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import VOCAB_SIZE
from tests.dist.launching import ROOT, environment, run_verb
from ultramem_ds.checkpoint.directory import checkpoints_dir, latest_checkpoint

pytestmark = pytest.mark.dist

OVERRIDES = (
    "model.hidden_size=32 model.inner_size=64 model.seq_len=64 train.global_batch_size=8 "
    f"model.vocab_size={VOCAB_SIZE} train.micro_batch_size=2 train.max_steps=5000 memory.knum=25 "
    "memory.top_m=4 train.eval_sequences=8 train.eval_every=0 model.dropout=0.1 "
    "train.background_save=true"
).split()
SERIES = ("step", "loss", "grad_norm", "lr", "lr_values", "tokens")


def series(run_dir: Path) -> list[list[Any]]:
    """Complete lines of the run's metrics."""
    with contextlib.suppress(FileNotFoundError):
        lines = (run_dir / "metrics.jsonl").read_text().split("\n")[:-1]
        return [[json.loads(line)[key] for key in SERIES] for line in lines]
    return []


@contextlib.contextmanager
def launched(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The launch script on two ranks, as in a terminal; nothing of it is left afterwards."""
    with open(log, "wb") as out:
        process = subprocess.Popen(
            ["bash", str(ROOT / "launch" / "one_node.sh"), *command],
            env=environment(NPROC="2"),
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        below: list[psutil.Process] = []
        try:
            yield process
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                below = psutil.Process(process.pid).children(recursive=True)
            for one in [*below, process]:
                with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                    one.kill()
            process.wait()


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + 120
    while len(series(run_dir)) < step:
        assert process.poll() is None and time.monotonic() < deadline_s, log.read_text()[-5000:]
        time.sleep(0.02)


def ranks_of(process: subprocess.Popen[bytes]) -> dict[int, psutil.Process]:
    """The rank processes below the script, without the workers that load data."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        parent = child.parent()
        if "RANK" in child.environ() and parent is not None and "RANK" not in parent.environ():
            found[int(child.environ()["RANK"])] = child
    return found


def test_signals_and_kills_continue_to_the_last_digit(prepared: Path, tmp_path: Path) -> None:
    """kill -9 of all ranks, SIGTERM to the script, SIGUSR1 to one rank; dropout on."""
    train = ["train", "--preset", "ultramem-debug", "--data", str(prepared), "--run-dir"]
    run_dir, log = tmp_path / "run", tmp_path / "log"
    command = [*train, str(run_dir), *OVERRIDES]

    with launched([*command, "train.save_every=2"], log) as script:
        wait_for_step(run_dir, 6, script, log)
        for rank in ranks_of(script).values():
            os.kill(rank.pid, signal.SIGKILL)
        assert script.wait(timeout=60) != 0
    reached = len(series(run_dir))
    latest = latest_checkpoint(run_dir)
    assert latest is not None
    saved = int(latest.name[-8:])
    assert reached - 5 < saved <= reached  # of every second step, the last perhaps half-written

    with launched([*command, "train.save_every=1000"], log) as script:
        wait_for_step(run_dir, reached + 1, script, log)
        script.send_signal(signal.SIGTERM)
        assert script.wait(timeout=60) == 0, log.read_text()
    assert f"resuming {run_dir} from step {saved}" in log.read_text()
    stopped = re.findall(r"stopped by a signal after step (\d+) of 5000; saved", log.read_text())
    assert len(stopped) == 1, log.read_text()
    first = int(stopped[0])
    latest = latest_checkpoint(run_dir)
    assert latest is not None and latest.name == f"step-{first:08d}"
    assert len(series(run_dir)) == first > reached  # the step in progress was finished, no other
    left = [path.name for path in checkpoints_dir(run_dir).iterdir()]
    assert not [name for name in left if name.startswith(".tmp")]

    with launched([*command, "train.save_every=1000"], log) as script:
        wait_for_step(run_dir, first + 1, script, log)
        ranks_of(script)[1].send_signal(signal.SIGUSR1)
        assert script.wait(timeout=60) == 0, log.read_text()
    assert f"resuming {run_dir} from step {first}" in log.read_text()
    second = len(series(run_dir))
    assert f"stopped by a signal after step {second} of 5000" in log.read_text()

    end = f"train.stop_at_step={second}"
    whole = run_verb(*train, str(tmp_path / "undisturbed"), *OVERRIDES, end, nproc=2)
    assert whole.returncode == 0, whole.stderr
    assert series(run_dir) == series(tmp_path / "undisturbed")


FAKE_SLURM = {
    # As SLURM does: srun starts the task on the node and sends what it is sent to all its processes.
    "srun": """#!/usr/bin/env python3
import os, signal, subprocess, sys
command = [a for a in sys.argv[1:] if not a.startswith("--kill-on")]
task = subprocess.Popen(command, env={**os.environ, "SLURM_NODEID": "0"}, start_new_session=True)
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda n, frame: os.killpg(task.pid, n))
sys.exit(task.wait())
""",
    "scontrol": """#!/usr/bin/env bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$*" >>"$SCONTROL_LOG"; fi
""",
}


def test_slurm_warning_reaches_the_ranks(prepared: Path, tmp_path: Path) -> None:
    """``--signal=B:USR1``: only the batch script is signalled; afterwards the job is queued again."""
    for name, text in FAKE_SLURM.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    log, run_dir = tmp_path / "log", tmp_path / "run"
    spooled = shutil.copy(ROOT / "launch" / "slurm.sh", tmp_path / "slurm_script")  # SLURM's copy
    script = subprocess.Popen(
        ["bash", str(spooled), "train", "--preset", "ultramem-debug"]
        + ["--data", str(prepared), "--run-dir", str(run_dir), *OVERRIDES],
        env=environment(
            PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
            SLURM_JOB_NODELIST="here",
            SLURM_NNODES="1",
            SLURM_JOB_ID="17",
            SLURM_SUBMIT_DIR=str(ROOT),
            NPROC="2",
            MASTER_PORT="29617",
            SCONTROL_LOG=str(tmp_path / "scontrol.log"),
        ),
        cwd=ROOT,
        stdout=open(log, "wb"),  # noqa: SIM115
        stderr=subprocess.STDOUT,
    )
    try:
        wait_for_step(run_dir, 2, script, log)
        script.send_signal(signal.SIGUSR1)
        assert script.wait(timeout=60) == 0, log.read_text()
    finally:
        script.kill()
    assert "stopped by a signal after step" in log.read_text()
    assert latest_checkpoint(run_dir) is not None
    assert (tmp_path / "scontrol.log").read_text() == "requeue 17\n"
