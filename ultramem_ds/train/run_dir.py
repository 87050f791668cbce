"""What a run directory says of its run before the first step."""

from __future__ import annotations

from pathlib import Path

from ultramem_ds.checkpoint import directory as checkpoints
from ultramem_ds.data.tokenizers import load_tokenizer, replace_tokenizer
from ultramem_ds.train.going_on import (
    changes_since,
    check_changes,
    entry_of,
    notes_on,
    write_config,
)
from ultramem_ds.train.run import Run
from ultramem_ds.utils.files import write_json
from ultramem_ds.watch.roster import Roster


def prepare_run_dir(run: Run) -> tuple[str, Path | None]:
    """Write it; one rank, which has the directory to itself.

    Returns:
        The job's name, and the checkpoint to go on from: an earlier job may have saved once more
        before it let go of the directory.

    Raises:
        ValueError: what that job saved last does not go with this command.
    """
    checkpoints.checkpoints_dir(run.run_dir).mkdir(parents=True, exist_ok=True)
    latest = checkpoints.newest_readable(run.run_dir)
    step, entry, notes = 0, None, []
    if latest is not None:
        state = checkpoints.read_trainer_state(latest)
        changes = changes_since(latest, state, run.config, run.mixture.fingerprint)
        check_changes(latest, state, changes, run.extend)
        step, entry = state.step, entry_of(state.step, changes) if changes else None
        notes = notes_on(changes, state, run.config)
    elif run.origin is not None:
        entry = run.origin.entry()
        notes = [f"starting from the weights of {run.origin.path}, step {run.origin.step}"]
    for note in notes:
        print(note, flush=True)
    write_config(run.run_dir, run.config, step, entry)
    write_json(run.run_dir / "deepspeed.json", run.deepspeed_json)
    replace_tokenizer(load_tokenizer(run.data_dir), run.run_dir)
    return Roster.reset(run.run_dir), latest
