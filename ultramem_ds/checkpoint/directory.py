"""Where checkpoints lie, which one is latest, and how a new one replaces it.

``RUN/checkpoints/step-00000200/`` holds DeepSpeed's files, ``trainer.json`` (step, world size,
data fingerprint, resolved configuration) and the random-number states. ``RUN/checkpoints/latest``
names the newest complete one; DeepSpeed's own tools read the same file.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ultramem_ds.checkpoint.record import check_files, read_layout
from ultramem_ds.checkpoint.safe import DamagedCheckpointError
from ultramem_ds.utils.files import fsync_directory, write_json, write_text

LATEST = "latest"
TRAINER = "trainer.json"
_TAG = re.compile(r"step-\d{8}")


@dataclass(frozen=True)
class TrainerState:
    """What a checkpoint says beside parameters and optimizer state.

    Attributes:
        step: optimizer steps taken.
        consumed_samples: sequences consumed from the mixture.
        data_fingerprint: of the mixture that they came from; empty if there was none.
        world_size: ranks that wrote the checkpoint.
        partition: how value tables were sharded, empty without tables.
        zero_stage: ZeRO stage that wrote it.
        config: the resolved configuration as nested plain values.
        skipped_samples: ranges of global samples that the run jumps over.
        guard: state of ``watch.guards.StepGuard``.
        micro_batch_size: sequences per rank and forward.
    """

    step: int
    consumed_samples: int
    data_fingerprint: str
    world_size: int
    partition: str
    zero_stage: int
    config: dict[str, Any]
    skipped_samples: list[list[int]] = field(default_factory=list)
    guard: dict[str, Any] = field(default_factory=dict)
    micro_batch_size: int = 0


def tag_of(step: int) -> str:
    """Directory name of the checkpoint after ``step`` optimizer steps."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Optimizer steps of the checkpoint in directory ``path``."""
    return int(path.name.removeprefix("step-"))


def checkpoints_dir(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint that ``latest`` names, or None if the run has none.

    Raises:
        ValueError: if ``latest`` does not name a complete checkpoint beside it.
    """
    directory = checkpoints_dir(run_dir)
    pointer = directory / LATEST
    if not pointer.exists():
        return None
    path = _named(directory)
    if path is None:
        others = [other.name for other in complete_checkpoints(directory)]
        raise ValueError(
            f"{pointer} names {_pointer_text(directory)!r}, which is not a complete checkpoint; "
            f"write the name of another one into it ({', '.join(others) or 'there is none'})"
        )
    return path


def resume_candidates(run_dir: Path) -> list[Path]:
    """What a run may resume from, best first: what ``latest`` names, then older ones.

    Newer ones than ``latest`` names are left out: somebody went back. Where it names nothing that
    exists, all complete ones count.
    """
    directory = checkpoints_dir(run_dir)
    named = _named(directory)
    complete = complete_checkpoints(directory)
    return [path for path in complete if named is None or path.name <= named.name]


def newest_readable(run_dir: Path) -> Path | None:
    """The best candidate to resume from whose trainer state is intact, None for a fresh run.

    Raises:
        ValueError: there are checkpoints, but not one of them is readable.
    """
    problem = ""
    for path in resume_candidates(run_dir):
        try:
            read_trainer_state(path)
        except DamagedCheckpointError as error:
            problem = problem or str(error)
        else:
            return path
    if problem or (checkpoints_dir(run_dir) / LATEST).exists():
        raise ValueError(
            f"no checkpoint of {run_dir} can be used: {problem or 'latest names none'}; delete "
            f"{checkpoints_dir(run_dir)} to start over"
        )
    return None


def _pointer_text(directory: Path) -> str:
    try:
        return (directory / LATEST).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _named(directory: Path) -> Path | None:
    """The complete checkpoint that ``latest`` names, if it names one of this directory."""
    tag = _pointer_text(directory)
    path = directory / tag
    return path if _TAG.fullmatch(tag) and _is_complete(path) else None


def complete_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints of a ``checkpoints`` directory, newest first."""
    return sorted(filter(_is_complete, directory.glob("step-*")), reverse=True)


def _is_complete(path: Path) -> bool:
    # A symbolic link could lead anywhere.
    known = _TAG.fullmatch(path.name) is not None and not path.is_symlink()
    return known and (path / TRAINER).is_file()


def find_checkpoint(path: Path, option: str = "--checkpoint") -> Path:
    """Resolve ``--checkpoint PATH``: a run directory (its latest) or one checkpoint under it.

    Args:
        path: what was given.
        option: how it was given, for messages.

    Raises:
        ValueError: if there is no checkpoint there.
    """
    if (path / TRAINER).exists():
        return path
    if not path.exists():
        raise ValueError(f"{option} {path}: no such directory")
    found = latest_checkpoint(path)
    if found is None:
        raise ValueError(f"{option} {path}: neither a checkpoint nor a run with one")
    return found


def read_trainer_state(checkpoint: Path) -> TrainerState:
    """Read ``trainer.json``.

    Raises:
        DamagedCheckpointError: if it is missing or is not what was written.
    """
    path = checkpoint / TRAINER
    if not path.is_file():
        raise DamagedCheckpointError(f"{path} does not exist: not a complete checkpoint")
    check_files(checkpoint, read_layout(checkpoint), [TRAINER])
    try:
        return TrainerState(**json.loads(path.read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise DamagedCheckpointError(f"{path} is not a trainer state: {error}") from None


def staging_tag(step: int) -> str:
    """Directory name while a checkpoint is being written."""
    return f".tmp-{tag_of(step)}"


def begin(run_dir: Path, step: int) -> Path:
    """Make an empty staging directory, and remove what earlier attempts left (one process only)."""
    directory = checkpoints_dir(run_dir)
    directory.mkdir(parents=True, exist_ok=True)
    _sweep(directory)
    staging = directory / staging_tag(step)
    staging.mkdir()
    return staging


def publish(
    run_dir: Path,
    state: TrainerState,
    seal: Callable[[Path], None],
    keep_last: int,
    keep_every: int,
) -> Path:
    """Turn a completely written staging directory into the latest checkpoint (one process only).

    Order matters for crashes: trainer state, record of all files, rename, ``latest``, and only then
    old ones go. What could fail for want of space comes before the rename.

    Args:
        run_dir: the run directory.
        state: what the checkpoint says beside parameters and optimizer state.
        seal: writes the record of all files of the directory it is given.
        keep_last: newest checkpoints that stay; 0 = all.
        keep_every: checkpoints of steps divisible by this stay too; 0 = none.
    """
    directory = checkpoints_dir(run_dir)
    staging = directory / staging_tag(state.step)
    final = directory / tag_of(state.step)
    write_json(staging / TRAINER, asdict(state))
    seal(staging)
    fsync_directory(staging)
    pointer = staging.with_name(f".tmp-{LATEST}")
    write_text(pointer, final.name + "\n")
    if final.exists():
        _discard(final)
    staging.rename(final)
    fsync_directory(directory)
    pointer.replace(directory / LATEST)
    fsync_directory(directory)
    _prune(directory, state.step, keep_last, keep_every)
    return final


def _prune(directory: Path, step: int, keep_last: int, keep_every: int) -> None:
    """Remove what a new latest checkpoint of ``step`` steps makes superfluous.

    Checkpoints of later steps are of a line that was given up (damaged, or the run went back), as
    are the lines of ``metrics.jsonl`` past the checkpoint that it went back to.
    """
    if keep_last:
        newest_first = sorted(
            (p for p in directory.iterdir() if _TAG.fullmatch(p.name)), reverse=True
        )
        of_this_line = [path for path in newest_first if path.name <= tag_of(step)]
        superfluous = of_this_line[keep_last:]
        if keep_every:
            superfluous = [path for path in superfluous if step_of(path) % keep_every]
        for path in superfluous + [p for p in newest_first if p not in of_this_line]:
            _discard(path)
    _sweep(directory)


def _discard(path: Path) -> None:
    """Give a checkpoint up: from one moment to the next it is none, whatever happens."""
    if path.is_symlink():
        path.unlink()
    else:
        path.rename(path.with_name(f".tmp-old-{path.name}"))


def _sweep(directory: Path) -> None:
    """Delete what is no checkpoint (yet, or any more)."""
    for leftover in directory.glob(".tmp-*"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def abandon(run_dir: Path) -> None:
    """Remove a half-written checkpoint (one process only)."""
    _sweep(checkpoints_dir(run_dir))


def run_dir_of(path: Path) -> Path:
    """The run directory that ``--checkpoint PATH`` belongs to."""
    return find_checkpoint(path).parent.parent
