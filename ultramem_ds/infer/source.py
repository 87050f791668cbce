"""What ``--checkpoint PATH`` can name: a run, a checkpoint under it, or an exported directory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ultramem_ds.checkpoint.directory import (
    complete_checkpoints,
    find_checkpoint,
    read_trainer_state,
    run_dir_of,
    step_of,
)
from ultramem_ds.checkpoint.parameters import parameter_records
from ultramem_ds.checkpoint.weights import RunWeights, WeightSource
from ultramem_ds.config.load import from_dict
from ultramem_ds.config.schema import Config
from ultramem_ds.exchange.directory import RUN
from ultramem_ds.exchange.importing import open_exported
from ultramem_ds.utils.files import read_json


@dataclass(frozen=True)
class Source:
    """A trained model, not yet loaded.

    Attributes:
        path: the checkpoint, or the exported directory.
        config: that it was trained with.
        step: optimizer steps taken.
        tokenizer_dir: holds its tokenizer.
        weights: read block by block.
    """

    path: Path
    config: Config
    step: int
    tokenizer_dir: Path
    weights: WeightSource


def open_source(path: Path) -> Source:
    """Find the model and check what can be checked without reading weights.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    if path.is_dir() and any(path.glob("*.safetensors")):
        exported = open_exported(path)
        run = read_json(path / RUN) if (path / RUN).is_file() else {}
        return Source(path, exported.config, int(run.get("step", 0)), path, exported.weights)
    checkpoint = find_checkpoint(path)
    with naming_others(checkpoint):
        config = from_dict(read_trainer_state(checkpoint).config)
        weights = RunWeights(checkpoint)
        weights.check_shapes(parameter_records(config))
    return Source(checkpoint, config, step_of(checkpoint), run_dir_of(checkpoint), weights)


@contextlib.contextmanager
def naming_others(path: Path) -> Iterator[None]:
    """If this checkpoint cannot be used, name the newest other one of its run, if there is one."""
    try:
        yield
    except ValueError as error:
        other = next((each for each in complete_checkpoints(path.parent) if each != path), None)
        if other is None:
            raise
        raise ValueError(f"{error}; the run has another one: --checkpoint {other}") from None
