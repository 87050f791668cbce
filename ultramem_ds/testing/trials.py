"""Trials of disturbed runs: start again until the end, then compare with an undisturbed run."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, TypeAlias

from ultramem_ds.checkpoint.directory import newest_readable, step_of
from ultramem_ds.testing.launched import Job

STEPS = 10
MAX_STARTS = 5
START_LIMIT_S = 240.0  # twenty times what a start takes on a quiet machine
_SMALL = (
    "model.hidden_size=32 model.inner_size=64 model.num_layers=2 model.seq_len=64 "
    "model.vocab_size=512 model.dropout=0.1 train.global_batch_size=8 train.micro_batch_size=2 "
    f"train.max_steps={STEPS} train.save_every=3 train.eval_every=5 train.eval_sequences=8 "
    "train.desync_every=2 train.log_every=1"
).split()
_OWN = {
    "ultramem-debug": ["memory.placement=1:2", "memory.knum=25", "memory.value_dim=16"]
    + ["memory.top_m=4", "memory.stats_every=4"],
    "moe-debug": ["moe.num_experts=4"],
}
# Of metrics.jsonl: neither what a machine did, nor statistics of windows that a restart cuts short.
_SERIES = frozenset(
    [
        "step",
        "loss",
        "grad_norm",
        "tokens",
        "lr",
        "lr_values",
        "aux_loss",
        "balance_loss",
        "expert_share",
        "bad_steps",
        "skipped",
        "samples",
    ]
)


@dataclass
class Trial:
    """One disturbed run and what became of it."""

    number: int
    preset: str
    fault: str
    detail: str = ""
    starts: int = 0
    exit_codes: list[int] = field(default_factory=list)
    seconds: float = 0.0
    identical: bool = False
    clear_error: bool = False
    wrong: str = ""
    hung: bool = False
    orphans: list[str] = field(default_factory=list)
    lost_checkpoint: str = ""
    segments: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Nothing went wrong that the fault does not excuse."""
        bad = self.wrong or self.hung or self.orphans or self.lost_checkpoint or self.segments
        return (self.identical or self.clear_error) and not bad


class Campaign:
    """Data, undisturbed runs and trials under one directory.

    Args:
        work: where everything lies.
        seed: of the plan.
    """

    def __init__(self, work: Path, seed: int) -> None:
        self.work = work
        self.seed = seed
        self.data = work / "data"
        self._references: dict[tuple[str, str], list[dict[str, Any]]] = {}
        work.mkdir(parents=True, exist_ok=True)
        if not (self.data / "manifest.json").exists():
            _prepare(work, self.data)

    def arguments(self, preset: str, run_dir: Path, *extra: str) -> list[str]:
        """Of ``train``."""
        places = ["--data", str(self.data), "--run-dir", str(run_dir)]
        return ["--preset", preset, *places, *_SMALL, *_OWN[preset], *extra]

    def reference(self, preset: str, faults: str = "") -> list[dict[str, Any]]:
        """Series of a run that nothing interrupts."""
        if (preset, faults) not in self._references:
            run_dir = self.work / f"undisturbed-{preset}-{faults.replace(':', '-')}"
            if (run_dir / "summary.json").exists():  # of an earlier part of the campaign
                self._references[preset, faults] = series(run_dir)
                return self._references[preset, faults]
            shutil.rmtree(run_dir, ignore_errors=True)
            job = Job(self.arguments(preset, run_dir), run_dir, faults=faults)
            if not job.ended(START_LIMIT_S) or job.process.returncode != 0:
                raise RuntimeError(f"undisturbed {preset} failed: {job.kill()} {job.output()}")
            self._references[preset, faults] = series(run_dir)
        return self._references[preset, faults]

    def run(self, number: int, preset: str, fault: str, disturbance: Disturbance) -> Trial:
        """One trial of ``fault``, which ``disturbance`` brings about."""
        rng = random.Random(f"{self.seed} {number} {preset} {fault}")
        trial = Trial(number, preset, fault)
        before = set(os.listdir("/dev/shm"))
        began = time.monotonic()
        run_dir = self.work / f"trial-{number:03d}"
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.rmtree(self.work / f"done-{number:03d}", ignore_errors=True)
        disturbance(self, trial, rng, run_dir)
        trial.seconds = round(time.monotonic() - began, 1)
        trial.segments = sorted(set(os.listdir("/dev/shm")) - before)
        return trial

    # --- what trials are made of

    def start(
        self,
        trial: Trial,
        run_dir: Path,
        *extra: str,
        faults: str = "",
        disturb: Callable[[Job], None] | None = None,
        damaged: bool = False,
        once: bool = True,
    ) -> str:
        """One start of the trial's command, to its end; returns the output."""
        best = _newest(run_dir)
        job = Job(
            self.arguments(trial.preset, run_dir, *extra),
            run_dir,
            faults=faults,
            done_dir=self.work / f"done-{trial.number:03d}" if once else None,
        )
        trial.starts += 1
        if disturb is not None:
            disturb(job)
        ended = job.ended(START_LIMIT_S)
        trial.hung |= job.process.poll() is None
        left = job.kill()
        if not ended and not trial.hung:
            trial.orphans += left
        trial.exit_codes.append(job.process.returncode)
        now = _newest(run_dir)
        if now < best and not damaged:
            trial.lost_checkpoint = f"step {best} before start {trial.starts}, then {now}"
        output = job.output()
        resumed = [line for line in output.splitlines() if line.startswith("resuming ")]
        if resumed and not damaged and f"from step {best}" not in resumed[0]:
            trial.lost_checkpoint = f"step {best} was there: {resumed[0]}"
        return output

    def to_the_end(
        self,
        trial: Trial,
        run_dir: Path,
        *extra: str,
        faults: str = "",
        damaged: bool = False,
        once: bool = True,
        reference_faults: str = "",
    ) -> None:
        """Start again until the run is finished, then compare."""
        while not (finished := (run_dir / "summary.json").exists()) and trial.starts < MAX_STARTS:
            self.start(trial, run_dir, *extra, faults=faults, damaged=damaged, once=once)
        if not finished:
            trial.wrong = f"not finished after {trial.starts} starts"
            return
        trial.wrong = difference(self.reference(trial.preset, reference_faults), series(run_dir))
        trial.identical = not trial.wrong


def series(run_dir: Path) -> list[dict[str, Any]]:
    """What a run computed, from its ``metrics.jsonl``: numbers and data, step by step."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k in _SERIES or k.startswith("data/")}
        for line in lines
    ]


def difference(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> str:
    """The first difference between two series, in words; empty if there is none."""
    if [r["step"] for r in expected] != [r["step"] for r in found]:
        return f"steps {[r['step'] for r in found]}"
    for a, b in zip(expected, found):
        for key in sorted(a.keys() | b.keys()):
            if a.get(key) != b.get(key):
                return f"step {a['step']}: {key} {b.get(key)!r} instead of {a.get(key)!r}"
    return ""


def _newest(run_dir: Path) -> int:
    with contextlib.suppress(ValueError):
        path = newest_readable(run_dir)
        return step_of(path) if path is not None else -1
    return -1


def _prepare(work: Path, data: Path) -> None:
    from ultramem_ds.data.prepare import PrepareConfig, prepare
    from ultramem_ds.data.tokenizer_training import train_on_inputs

    source = work / "source" / "docs"
    source.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}) + "\n" for _, text in sorted(topics.items())]
    (source / "docs.jsonl").write_text("".join(lines))
    train_on_inputs([source], work / "tokenizer.json", vocab_size=512)
    settings = PrepareConfig(workers=1, validation_share=0.1)
    prepare([source], data, work / "tokenizer.json", settings)


# Starts the run, lets something happen to it, and sees it through.
Disturbance: TypeAlias = Callable[[Campaign, Trial, random.Random, Path], None]
