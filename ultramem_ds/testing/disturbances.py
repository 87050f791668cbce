"""The faults of the campaign: what happens to a run, and what it must do about it."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ultramem_ds.checkpoint.directory import checkpoints_dir, resume_candidates
from ultramem_ds.testing.launched import Job, faults_of
from ultramem_ds.testing.trials import STEPS, Campaign, Disturbance, Trial

PHASES = ("data", "forward", "backward", "optimizer")


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


FAULTS: dict[str, Disturbance] = {
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
