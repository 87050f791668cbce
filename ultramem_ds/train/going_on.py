"""How a run goes on from its own checkpoint: what has changed, whether it may, what is noted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ultramem_ds.checkpoint.directory import TrainerState
from ultramem_ds.config.load import from_dict, to_dict
from ultramem_ds.config.schema import Config
from ultramem_ds.optim.param_groups import SCHEDULES
from ultramem_ds.train.keys import DATA, Change, Freedom, changes_between
from ultramem_ds.utils.files import read_json, write_json

CONFIG = "config.json"
HISTORY = "history"


def changes_since(
    checkpoint: Path, state: TrainerState, config: Config, fingerprint: str
) -> list[Change]:
    """What differs from the run that wrote a checkpoint.

    Args:
        checkpoint: where it lies, for messages.
        state: its trainer state.
        config: of the run now.
        fingerprint: of its data now.

    Raises:
        ValueError: the checkpoint's configuration is one that this program does not know.
    """
    try:
        old = from_dict(state.config)
    except ValueError as error:
        raise ValueError(
            f"{checkpoint} has a configuration that this program does not know: {error}; use the "
            "version that trained it or another --run-dir"
        ) from None
    changes = changes_between(old, config)
    if state.data_fingerprint not in ("", fingerprint):  # an imported model has seen no data
        changes.append(Change(DATA, state.data_fingerprint, fingerprint))
    return changes


def check_changes(
    checkpoint: Path, state: TrainerState, changes: Sequence[Change], extend: bool
) -> None:
    """Whether a run may go on with what has changed.

    Args:
        checkpoint: what it goes on from.
        state: its trainer state.
        changes: see :func:`changes_since`.
        extend: ``--extend`` was given.

    Raises:
        ValueError: for the change that is least allowed, saying what to do.
    """
    allowed = Freedom.EXTEND if extend else Freedom.RESUME
    worst = max(changes, key=lambda change: change.freedom, default=None)
    if worst is not None and worst.freedom > allowed:
        raise ValueError(_refusal(checkpoint, worst, changes, allowed))
    for change in changes:
        if change.key == "train.max_steps" and change.after <= state.step:
            raise ValueError(
                f"{checkpoint} has taken {state.step} steps: train.max_steps={change.after} leaves "
                "nothing to do; set a larger one"
            )


def _refusal(checkpoint: Path, worst: Change, changes: Sequence[Change], allowed: Freedom) -> str:
    others = [c.key for c in changes if c.freedom > allowed and c is not worst]
    too = f" (and {', '.join(others)})" if others else ""
    if worst.key == DATA:
        what = (
            f"{checkpoint} was trained on other data{too} (fingerprint {worst.before[:12]}, here "
            f"{worst.after[:12]}); use the same --data"
        )
    else:
        what = (
            f"{checkpoint} was trained with {worst.key}={worst.before!r}, not {worst.after!r}"
            f"{too}; resume with the old value"
        )
    if worst.freedom == Freedom.EXTEND:
        return f"{what}, add --extend to go on with the new, or use another --run-dir"
    if worst.freedom == Freedom.START:
        run = checkpoint.parent.parent
        return f"{what}, or start anew from its weights: another --run-dir and --init-from {run}"
    return f"{what} or use another --run-dir"


def notes_on(changes: Sequence[Change], state: TrainerState, config: Config) -> list[str]:
    """Lines for the console about what differs; none if nothing does."""
    lines = []
    for freedom, how in ((Freedom.RESUME, "changed"), (Freedom.EXTEND, "extended")):
        described = [change.describe() for change in changes if change.freedom == freedom]
        if described:
            lines.append(f"{how} from step {state.step} on: {'; '.join(described)}")
    if any(change.freedom == Freedom.EXTEND for change in changes):
        old = from_dict(state.config)
        rates = [
            f"{name} {schedule(state.step, old.train.max_steps, old.optim):.3g} -> "
            f"{schedule(state.step, config.train.max_steps, config.optim):.3g}"
            for name, schedule in SCHEDULES.items()
            if name != "tables" or config.has_memory
        ]
        lines.append(f"learning rates of step {state.step + 1}: {'; '.join(rates)}")
    if any(change.key == DATA for change in changes):
        lines.append(f"the new data are read from their sample {state.consumed_samples} on")
    return lines


def entry_of(step: int, changes: Sequence[Change]) -> dict[str, Any]:
    """A line of the history: after ``step`` steps these keys changed, ``[before, after]``."""
    return {"step": step, "changed": {c.key: [c.before, c.after] for c in changes}}


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    """What happened to a run's settings, oldest first; empty for a new run."""
    path = run_dir / CONFIG
    history: list[dict[str, Any]] = read_json(path).get(HISTORY, []) if path.exists() else []
    return history


def write_config(
    run_dir: Path, config: Config, step: int, entry: dict[str, Any] | None = None
) -> None:
    """Write ``config.json``: the resolved configuration and the history of its changes.

    Args:
        run_dir: the run directory.
        config: of the run now.
        step: optimizer steps taken; what an attempt that was given up noted beyond them goes, as
            its lines of ``metrics.jsonl`` do.
        entry: what is to be added.
    """
    kept = [old for old in read_history(run_dir) if old["step"] < step or "init_from" in old]
    history = [*kept, *([entry] if entry else [])]
    write_json(run_dir / CONFIG, {**to_dict(config), **({HISTORY: history} if history else {})})
