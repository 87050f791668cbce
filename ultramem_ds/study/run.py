"""Runs a study's trials, some at a time, or hands them to SLURM; resumable at any point.

A trial is finished when its run directory has the summary of its last step; anything else is begun
or resumed by ``train`` itself. Checkpoints of finished trials are deleted unless asked for: the
numbers that a study reads are in ``validation.jsonl`` and ``metrics.jsonl``.
"""

from __future__ import annotations

import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from ultramem_ds.config.load import changed_keys, load_run_config
from ultramem_ds.study.expand import Trial
from ultramem_ds.utils.files import read_json

# What may differ between a run directory and the study: it changes no number that is compared.
_FREE = ("train.save_every", "train.keep_last", "train.stop_at_step", "data.num_workers")
CONSOLE = "console.log"
_POLL_S = 0.2
_HANDED_ON = -1  # after the signals that have been


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How trials are run.

    Attributes:
        data: prepared data.
        output: the study's directory.
        num_ranks: processes of one run on this machine.
        jobs: runs at a time.
        keep_checkpoints: of finished trials.
    """

    data: Path
    output: Path
    num_ranks: int = 1
    jobs: int = 1
    keep_checkpoints: bool = False


def is_finished(trial: Trial, output: Path) -> bool:
    """Whether the trial's numbers are all there.

    Raises:
        ValueError: if its run directory holds a run with other settings.
    """
    run_dir = output / trial.run_dir
    if not (run_dir / "config.json").exists():
        return False
    there = load_run_config(run_dir / "config.json")
    other = [key for key in changed_keys(there, trial.config) if key not in _FREE]
    if other:
        raise ValueError(
            f"{run_dir} is a run with another {', '.join(other[:3])} than the study's; delete "
            "it or use another --output"
        )
    summary = run_dir / "summary.json"
    return summary.exists() and read_json(summary)["step"] == trial.steps


def train_command(trial: Trial, settings: Settings) -> list[str]:
    """The ``train`` verb and its arguments."""
    return [
        *("train", "--preset", trial.line.preset, "--data", str(settings.data)),
        *("--run-dir", str(settings.output / trial.run_dir), *trial.overrides),
    ]


def run_trials(trials: Sequence[Trial], settings: Settings) -> list[str]:
    """Run what is not finished, in order; a trial that fails does not stop the others.

    Returns:
        A line about every trial that failed.

    Raises:
        ValueError: if a run directory holds a run with other settings.
        KeyboardInterrupt: after a signal, when the runs in progress have saved and ended.
    """
    todo = [trial for trial in trials if not is_finished(trial, settings.output)]
    print(f"{len(trials)} runs, {len(trials) - len(todo)} of them finished", flush=True)
    waiting = list(enumerate(todo, 1))
    running: dict[str, tuple[Trial, subprocess.Popen[bytes]]] = {}
    failed = []
    with _signals() as received:
        while waiting or running:
            if received:
                _hand_on(received, running.values())
                waiting.clear()
            while waiting and len(running) < settings.jobs:
                number, trial = waiting.pop(0)
                print(f"[{number}/{len(todo)}] {trial.run_dir.name}", flush=True)
                running[trial.run_dir.name] = (trial, _start(trial, settings))
            time.sleep(_POLL_S)
            for name, (trial, process) in list(running.items()):
                if (code := process.poll()) is None:
                    continue
                del running[name]
                if is_finished(trial, settings.output):
                    _tidy(settings.output / trial.run_dir, settings.keep_checkpoints)
                elif not received:
                    console = settings.output / trial.run_dir / CONSOLE
                    failed.append(f"{name}: exit code {code}, see {console}")
                    print(f"FAILED {failed[-1]}", file=sys.stderr, flush=True)
        if received:
            raise KeyboardInterrupt
    return failed


def _start(trial: Trial, settings: Settings) -> subprocess.Popen[bytes]:
    """One run in a session of its own: a signal reaches it once, from here."""
    start = [sys.executable, "-m", "ultramem_ds"]
    if settings.num_ranks > 1:
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        start = [sys.executable, "-m", "ultramem_ds.launcher"]
        start += ["--num_gpus", str(settings.num_ranks), "--no_local_rank"]
        start += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
        start += ["--module", "ultramem_ds"]
    run_dir = settings.output / trial.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / CONSOLE, "a") as log:
        command = [*start, *train_command(trial, settings)]
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def _tidy(run_dir: Path, keep_checkpoints: bool) -> None:
    if not keep_checkpoints:
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)


def _hand_on(received: list[int], running: Iterable[tuple[Trial, subprocess.Popen[bytes]]]) -> None:
    """Hand a signal on as SIGTERM, of which ``train`` saves; once."""
    if received[-1] != _HANDED_ON:
        received.append(_HANDED_ON)
        for _, process in running:
            process.send_signal(signal.SIGTERM)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Yields the SIGTERM and SIGINT that came."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {n: signal.signal(n, receive) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def submit_trials(
    trials: Sequence[Trial], settings: Settings, options: str, script: Path
) -> list[str]:
    """Hand every unfinished trial to SLURM as a job of its own.

    Args:
        trials: of the study.
        settings: where data and runs are.
        options: of ``sbatch``, such as ``--nodes=1 --gpus-per-node=1 --time=4:00:00``.
        script: ``launch/slurm.sh`` of the checkout.

    Returns:
        What ``sbatch`` said, a line per job.

    Raises:
        ValueError: without ``sbatch`` or the script, or if ``sbatch`` refuses.
    """
    if shutil.which("sbatch") is None:
        raise ValueError("--submit needs SLURM's sbatch, which is not on this machine's PATH")
    if not script.exists():
        raise ValueError(f"{script} is not there: submit from the repository's root")
    said = []
    for trial in trials:
        if is_finished(trial, settings.output):
            continue
        run_dir = settings.output / trial.run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        job = [f"--job-name={trial.run_dir.name}", f"--output={run_dir / CONSOLE}"]
        command = ["sbatch", *job, "--open-mode=append", *shlex.split(options), str(script)]
        done = subprocess.run(
            [*command, *train_command(trial, settings)], capture_output=True, text=True
        )
        if done.returncode:
            raise ValueError(f"sbatch refused {trial.run_dir.name}: {done.stderr.strip()}")
        said.append(f"{trial.run_dir.name}: {done.stdout.strip()}")
    return said
