"""A campaign of faults: runs are disturbed and started again until they finish, then compared.

    python -m ultramem_ds.testing.chaos [--trials 30] [--seed 0] [--work DIR] [--json FILE]

Each trial is a small run of two ranks and one fault at a random place (:data:`FAULTS`). The same
command is started again until the run says that it is finished. Then every number of its
``metrics.jsonl`` that does not measure time must equal, to the last digit, an undisturbed run's.
Besides: every start must end in bounded time and leave no process and no shared memory behind, and
no start may find less than the newest checkpoint that was complete before (but for trials that
damage it). ``model.dropout`` is on, so that random-number states count.

The plan is a function of the seed; where a kill hits within a step depends on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from ultramem_ds.checkpoint.directory import (
    checkpoints_dir,
    newest_readable,
    resume_candidates,
    step_of,
)
from ultramem_ds.telemetry.report import markdown_table
from ultramem_ds.testing.launched import Job, faults_of

STEPS = 10
MAX_STARTS = 5
START_LIMIT_S = 240.0  # twenty times what a start takes on a quiet machine
PRESETS = ("ultramem-debug", "moe-debug")
PHASES = ("data", "forward", "backward", "optimizer")
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

    def run(self, number: int, preset: str, fault: str) -> Trial:
        """One trial."""
        rng = random.Random(f"{self.seed} {number} {preset} {fault}")
        trial = Trial(number, preset, fault)
        before = set(os.listdir("/dev/shm"))
        began = time.monotonic()
        run_dir = self.work / f"trial-{number:03d}"
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.rmtree(self.work / f"done-{number:03d}", ignore_errors=True)
        FAULTS[fault](self, trial, rng, run_dir)
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


# --- faults: each starts the run, lets something happen to it, and sees it through


def _injected(what: str, phases: Sequence[str] = ("forward",), *extra: str, first: int = 1) -> Any:
    def trial_of(campaign: Campaign, trial: Trial, rng: random.Random, run_dir: Path) -> None:
        step, rank, phase = rng.randint(first, STEPS), rng.randrange(2), rng.choice(phases)
        if phase == "save":
            step = rng.choice((3, 6, 9))
        background = [f"train.background_save={rng.choice(('true', 'false'))}"]
        trial.detail = f"{what}@{step}:{rank}:{phase} {background[0]}"
        fault = f"{what}@{step}:{rank}:{phase}"
        campaign.to_the_end(trial, run_dir, *background, *extra, faults=fault)

    return trial_of


def _signalled(number: signal.Signals, whole: bool) -> Any:
    def trial_of(campaign: Campaign, trial: Trial, rng: random.Random, run_dir: Path) -> None:
        step = rng.randint(1, STEPS - 2)
        trial.detail = f"{number.name} to the launcher near step {step}"

        def disturb(job: Job) -> None:
            if job.pid_at_step(0, step):
                job.process.send_signal(number)

        # A little stall lets the signal come before the end.
        output = campaign.start(trial, run_dir, disturb=disturb, faults=f"pause@{step + 1}:0")
        if whole and "stopped by a signal" in output and trial.exit_codes[-1] != 0:
            trial.wrong = f"stopped by a signal with exit code {trial.exit_codes[-1]}"
            return
        campaign.to_the_end(trial, run_dir, faults=f"pause@{step + 1}:0")

    return trial_of


def _damaged(flip: bool) -> Any:
    def trial_of(campaign: Campaign, trial: Trial, rng: random.Random, run_dir: Path) -> None:
        step = rng.randint(7, STEPS)
        campaign.start(trial, run_dir, faults=f"kill@{step}:{rng.randrange(2)}")
        candidates = resume_candidates(run_dir)
        files = sorted(p for p in candidates[0].rglob("*") if p.is_file() and p.stat().st_size)
        victim = rng.choice(files)
        content = bytearray(victim.read_bytes())
        at = rng.randrange(len(content))
        if flip:
            content[at] ^= 1 << rng.randrange(8)
        else:
            del content[at:]
        victim.write_bytes(content)
        name = victim.relative_to(checkpoints_dir(run_dir))
        trial.detail = f"{name} {'flipped' if flip else 'cut'} at byte {at} of {len(candidates)}"
        campaign.to_the_end(trial, run_dir, damaged=True)

    return trial_of


def _full_disk(campaign: Campaign, trial: Trial, rng: random.Random, run_dir: Path) -> None:
    run_dir.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(run_dir)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        trial.detail, trial.clear_error = "no permission to mount a tmpfs: not tried", True
        return
    try:
        campaign.start(trial, run_dir, "train.keep_last=1", faults="kill@5:0")
        free = shutil.disk_usage(run_dir).free
        share = rng.uniform(0.1, 0.9)
        checkpoint = sum(p.stat().st_size for p in resume_candidates(run_dir)[0].rglob("*"))
        left = int(checkpoint * share)
        (run_dir / "filler").write_bytes(bytes(free - left))
        trial.detail = f"{left} bytes free, a checkpoint takes {checkpoint}"
        output = campaign.start(trial, run_dir, "train.keep_last=1")
        if "could not be saved" not in output and "No space left" not in output:
            trial.wrong = "a full disk went unnoticed"
            return
        (run_dir / "filler").unlink()
        (run_dir / "summary.json").unlink(missing_ok=True)  # written without its checkpoint
        campaign.to_the_end(trial, run_dir, "train.keep_last=1")
    finally:
        subprocess.run(["umount", str(run_dir)], capture_output=True, check=True)


def _bad_batch_stops(campaign: Campaign, trial: Trial, rng: random.Random, run_dir: Path) -> None:
    fault = f"{rng.choice(('nan', 'nangrad'))}@{rng.randint(2, STEPS)}:{rng.randrange(2)}"
    trial.detail = f"{fault}, train.max_bad_steps=1"
    output = campaign.start(trial, run_dir, "train.max_bad_steps=1", faults=fault)
    if "steps in a row were skipped" not in output or trial.exit_codes[-1] == 0:
        trial.wrong = "no report of the bad step"
        return
    campaign.to_the_end(trial, run_dir, "train.max_bad_steps=1", faults=fault)


def _bad_batch_skipped(campaign: Campaign, trial: Trial, rng: random.Random, run_dir: Path) -> None:
    """A skipped step leaves the same run, on whichever rank and however often it is restarted."""
    what, step = rng.choice(("nan", "nangrad")), rng.randint(2, STEPS - 2)
    kill = f"kill@{rng.randint(step + 1, STEPS)}:{rng.randrange(2)}"
    trial.detail = f"{what}@{step}:1, {kill}; against {what}@{step}:0"
    campaign.start(trial, run_dir, faults=f"{what}@{step}:1 {kill}", once=False)
    campaign.to_the_end(
        trial,
        run_dir,
        faults=f"{what}@{step}:1",
        once=False,
        reference_faults=f"{what}@{step}:0",
    )
    if not any(event["kind"] == "bad step" for event in faults_of(run_dir)):
        trial.wrong = "the bad step was not logged"


FAULTS: dict[str, Callable[[Campaign, Trial, random.Random, Path], None]] = {
    "kill -9 of a rank": _injected("kill", PHASES),
    "kill -9 while saving": _injected("kill", ("save",)),
    "kill -9 of the launcher": _signalled(signal.SIGKILL, whole=False),
    "kill -9 of DeepSpeed's launcher": _injected("killlauncher", PHASES),
    "SIGTERM": _signalled(signal.SIGTERM, whole=True),
    "SIGTERM of one rank": _injected("term", PHASES),
    "truncated checkpoint": _damaged(flip=False),
    "flipped checkpoint": _damaged(flip=True),
    "full disk": _full_disk,
    "NaN, stop": _bad_batch_stops,
    "NaN, skip": _bad_batch_skipped,
    "frozen rank": _injected("freeze", PHASES, "train.watchdog_s=4", first=2),
    "stalled rank": _injected("stall", ("forward", "data"), "train.watchdog_s=4", first=2),
    "exception on a rank": _injected("raise", PHASES),
}


def tally(trials: Sequence[Trial]) -> str:
    """A table by fault, and the totals."""
    header = [
        "fault",
        "trials",
        "starts",
        "same series",
        "clear error",
        "wrong",
        "lost checkpoints",
    ]
    header += ["hangs", "orphans", "shared memory left"]

    def row(name: str, group: Sequence[Trial]) -> list[str]:
        numbers = [
            len(group),
            sum(t.starts for t in group),
            sum(t.identical for t in group),
            sum(t.clear_error for t in group),
            sum(bool(t.wrong) for t in group),
            sum(bool(t.lost_checkpoint) for t in group),
            sum(t.hung for t in group),
            sum(len(t.orphans) for t in group),
            sum(len(t.segments) for t in group),
        ]
        return [name, *map(str, numbers)]

    names = [name for name in FAULTS if any(t.fault == name for t in trials)]
    rows = [row(name, [t for t in trials if t.fault == name]) for name in names]
    return markdown_table(header, [*rows, row("all", trials)])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign; exit code 1 if a trial did not pass."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="kept afterwards; default: a temporary directory")
    parser.add_argument(
        "--json", type=Path, help="where to write every trial; with --work, goes on where it ends"
    )
    parser.add_argument("--fault", action="append", choices=list(FAULTS), help="only these")
    parser.add_argument("--preset", action="append", choices=PRESETS, help="only these")
    parser.add_argument("--minutes", type=float, help="start no trial after so long")
    arguments = parser.parse_args(argv)
    presets = arguments.preset or list(PRESETS)
    names = arguments.fault or list(FAULTS)
    with contextlib.ExitStack() as stack:
        work = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        campaign = Campaign(work.resolve(), arguments.seed)
        trials: list[Trial] = []
        if arguments.json is not None and arguments.work is not None and arguments.json.exists():
            trials = [Trial(**values) for values in json.loads(arguments.json.read_text())]
        began = time.monotonic()
        for number in range(len(trials), arguments.trials):
            fault = names[number % len(names)]
            # Both presets meet every fault when there are enough trials.
            preset = presets[(number + number // len(names)) % len(presets)]
            if arguments.minutes and time.monotonic() - began > 60 * arguments.minutes:
                print(f"{arguments.minutes:g} minutes are over after {number} trials")
                return 75  # not finished: the same command goes on
            trial = campaign.run(number, preset, fault)
            trials.append(trial)
            state = "ok" if trial.passed else f"FAILED {trial.wrong or asdict(trial)}"
            print(
                f"{number:3d} {preset:15s} {fault:32s} {trial.starts} starts "
                f"{trial.seconds:5.1f} s  {state}  ({trial.detail})",
                flush=True,
            )
            if arguments.json is not None:
                content = json.dumps([asdict(t) for t in trials], indent=1)
                arguments.json.write_text(content + "\n")
    print("\n" + tally(trials))
    return 0 if all(trial.passed for trial in trials) else 1


if __name__ == "__main__":
    sys.exit(main())
