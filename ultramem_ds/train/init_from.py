"""``--init-from``: a new run that starts from the weights of another.

Weights and the memory layers' directions are taken over; optimizer, schedule, data and every key
that decides no parameter are the new run's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultramem_ds.checkpoint.directory import find_checkpoint, read_trainer_state, run_dir_of
from ultramem_ds.checkpoint.weights import RunWeights, WeightSource
from ultramem_ds.config.load import from_dict
from ultramem_ds.config.schema import Config
from ultramem_ds.data.same_tokenizer import require_same
from ultramem_ds.data.tokenizers import Tokenizer
from ultramem_ds.exchange.directory import CONFIG, RUN
from ultramem_ds.exchange.importing import open_exported
from ultramem_ds.train.going_on import read_history
from ultramem_ds.train.keys import Freedom, changes_between
from ultramem_ds.utils.files import read_json

OPTION = "--init-from"


@dataclass(frozen=True)
class Origin:
    """A trained model that a run can start from; its weights have not been read.

    Attributes:
        path: as it was given.
        config: what it was trained with.
        tokenizer_dir: holds its tokenizer.
        step: optimizer steps that its weights have seen.
        open: the weights, for a rank.
    """

    path: Path
    config: Config
    tokenizer_dir: Path
    step: int
    open: Callable[[int], WeightSource]

    def entry(self) -> dict[str, Any]:
        """The line of a run's history that says where it started."""
        return {"step": 0, "init_from": str(self.path.absolute()), "init_step": self.step}


def open_origin(path: Path) -> Origin:
    """What ``--init-from PATH`` names: a run, a checkpoint of one, or an exported model.

    Raises:
        ValueError: it is none of them, or is damaged.
    """
    if _is_exported(path):
        source = open_exported(path, OPTION)
        step = read_json(path / RUN).get("step", 0) if (path / RUN).is_file() else 0
        return Origin(path, source.config, path, step, lambda rank: source.weights)
    checkpoint = find_checkpoint(path, OPTION)
    state = read_trainer_state(checkpoint)
    try:
        config = from_dict(state.config)
    except ValueError as error:
        raise ValueError(f"{OPTION} {path}: {error}; use the version that trained it") from None
    return Origin(
        path, config, run_dir_of(path), state.step, lambda rank: RunWeights(checkpoint, rank)
    )


def _is_exported(path: Path) -> bool:
    """Whether ``path`` is in transformers' layout: a run's ``config.json`` names no model type."""
    return (path / CONFIG).is_file() and "model_type" in read_json(path / CONFIG)


def check_origin(origin: Origin, config: Config, data_dir: Path, tokenizer: Tokenizer) -> None:
    """Whether the weights are those of a model like this run's, and speak its tokens.

    Raises:
        ValueError: naming the first key or file that does not fit.
    """
    for change in changes_between(origin.config, config):
        if change.freedom < Freedom.MODEL:
            continue
        if change.key in ("model.kind", "memory.placement"):
            advice = "start from weights of such a model"
        else:
            advice = f"weights neither grow nor shrink: set {change.key}={change.before}"
        raise ValueError(
            f"{OPTION} {origin.path}: {change.key} is {change.before!r} there and "
            f"{change.after!r} in this run; {advice}"
        )
    require_same(origin.tokenizer_dir, tokenizer, data_dir)


def check_started_from(run_dir: Path, origin: Origin) -> None:
    """A run that resumes under ``--init-from`` must have started there.

    Raises:
        ValueError: it did not.
    """
    entry = origin.entry()
    if not any(old.get("init_from") == entry["init_from"] for old in read_history(run_dir)):
        raise ValueError(
            f"{run_dir} has checkpoints and did not start from {OPTION} {origin.path}: leave the "
            "option out to resume, or use another --run-dir"
        )
