"""Where checkpoints lie, which one is latest, and how a new one replaces it.

``RUN/checkpoints/step-00000200/`` holds DeepSpeed's files, ``trainer.json`` (step, world size,
data fingerprint, resolved configuration) and the random-number states. ``RUN/checkpoints/latest``
names the newest complete one; DeepSpeed's own tools read the same file.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ultramem_ds.utils.files import fsync_directory, write_json, write_text

LATEST = "latest"
TRAINER = "trainer.json"
_TAG = re.compile(r"^step-(\d{8})$")


@dataclass(frozen=True)
class TrainerState:
    """What a checkpoint says beside parameters and optimizer state.

    Attributes:
        step: optimizer steps taken.
        consumed_samples: sequences consumed from the mixture.
        data_fingerprint: of the mixture that they came from.
        world_size: ranks that wrote the checkpoint.
        partition: how value tables were sharded, empty without tables.
        zero_stage: ZeRO stage that wrote it.
        config: the resolved configuration as nested plain values.
        skipped_samples: ranges of global samples that the run jumps over.
        guard: state of ``train.guards.StepGuard``.
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


def tag_of(step: int) -> str:
    """Directory name of the checkpoint after ``step`` optimizer steps."""
    return f"step-{step:08d}"


def checkpoints_dir(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint that ``latest`` names, or None if the run has none.

    Raises:
        ValueError: if ``latest`` names a directory that is not there.
    """
    directory = checkpoints_dir(run_dir)
    pointer = directory / LATEST
    if not pointer.exists():
        return None
    tag = pointer.read_text().strip()
    path = directory / tag
    if not _TAG.match(tag) or not (path / TRAINER).exists():
        raise ValueError(
            f"{pointer} names {tag!r}, which is not a complete checkpoint; write the name of "
            f"another directory of {directory} into it, or delete it to start over"
        )
    return path


def find_checkpoint(path: Path) -> Path:
    """Resolve ``--checkpoint PATH``: a run directory (its latest) or one checkpoint under it.

    Raises:
        ValueError: if there is no checkpoint there.
    """
    if (path / TRAINER).exists():
        return path
    if not path.exists():
        raise ValueError(f"--checkpoint {path}: no such directory")
    found = latest_checkpoint(path)
    if found is None:
        raise ValueError(f"--checkpoint {path}: neither a checkpoint nor a run with one")
    return found


def read_trainer_state(checkpoint: Path) -> TrainerState:
    """Read ``trainer.json``.

    Raises:
        ValueError: if it is missing or does not hold what it should.
    """
    path = checkpoint / TRAINER
    try:
        return TrainerState(**json.loads(path.read_text()))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: not a complete checkpoint") from None
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path} is not a trainer state: {error}") from None


def staging_tag(step: int) -> str:
    """Directory name while a checkpoint is being written."""
    return f".tmp-{tag_of(step)}"


def publish(run_dir: Path, state: TrainerState, keep_last: int) -> Path:
    """Turn a completely written staging directory into the latest checkpoint (one process only).

    Order matters for crashes: trainer state, rename, ``latest``, and only then old ones go.
    """
    directory = checkpoints_dir(run_dir)
    staging = directory / staging_tag(state.step)
    final = directory / tag_of(state.step)
    write_json(staging / TRAINER, asdict(state))
    if final.exists():
        shutil.rmtree(final)
    staging.rename(final)
    fsync_directory(directory)
    write_text(directory / LATEST, final.name + "\n")
    _prune(directory, keep_last)
    return final


def _prune(directory: Path, keep_last: int) -> None:
    for leftover in directory.glob(".tmp-step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if keep_last == 0:
        return
    finished = sorted(path for path in directory.iterdir() if _TAG.match(path.name))
    for old in finished[:-keep_last]:
        shutil.rmtree(old)


def run_dir_of(path: Path) -> Path:
    """The run directory that ``--checkpoint PATH`` belongs to."""
    return find_checkpoint(path).parent.parent
