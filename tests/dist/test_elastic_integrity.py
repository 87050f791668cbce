"""Damaged checkpoints are detected, named, and stop every rank with the reason."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.elastic_series import Leg, build_engine, run_legs
from ultramem_ds.checkpoint.reader import CheckpointReader
from ultramem_ds.checkpoint.record import LAYOUT, write_layout, write_rank_layout
from ultramem_ds.checkpoint.safe import safe_load
from ultramem_ds.infer.load import load_model
from ultramem_ds.testing.distributed import run_ranks
from ultramem_ds.zero.capture import STATE_CLASSES
from ultramem_ds.checkpoint import directory as checkpoints

SHARD = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


@pytest.fixture(scope="module")
def leg(tmp_path_factory: pytest.TempPathFactory) -> Leg:
    """A run of one UltraMem step on 2 ranks, by rows."""
    run_dir = tmp_path_factory.mktemp("good")
    rows = ("memory.partition=number-wise",)
    good = Leg(kind="ultramem", begin=0, end=1, run_dir=run_dir / "a", overrides=rows)
    other = replace(good, run_dir=run_dir / "b", overrides=(*rows, "train.seed=1"))
    run_ranks(run_legs, 2, [good, other])
    return good


def latest(run_dir: Path) -> Path:
    found = checkpoints.latest_checkpoint(run_dir)
    assert found is not None
    return found


def damage_missing(checkpoint: Path, leg: Leg) -> None:
    (checkpoint / SHARD).unlink()


def damage_short(checkpoint: Path, leg: Leg) -> None:
    whole = (checkpoint / SHARD).read_bytes()
    (checkpoint / SHARD).write_bytes(whole[: len(whole) // 2])


def damage_foreign(checkpoint: Path, leg: Leg) -> None:
    shutil.copy(latest(leg.run_dir.parent / "b") / SHARD, checkpoint / SHARD)


def rerecord(checkpoint: Path, rank: int, files: list[str]) -> None:
    """Make the record fit files that were changed, as whoever crafts a checkpoint would."""
    reader = CheckpointReader(checkpoint)
    written = [name for name, record in reader.layout.files.items() if record.rank == rank]
    written = [name for name in written if name.startswith(("zero", "rng", "tables"))]
    write_rank_layout(checkpoint, rank, reader.stores[rank], {*written, *files})
    (checkpoint / LAYOUT).unlink()
    write_layout(checkpoint, len(reader.stores), reader.parameters)


def damage_nan(checkpoint: Path, leg: Leg) -> None:
    """As if training itself had written it: the record is made anew."""
    stored = safe_load(checkpoint / SHARD, mmap=False, classes=STATE_CLASSES)
    stored["optimizer_state_dict"]["fp32_flat_groups"][2].data[5] = float("nan")
    torch.save(stored, checkpoint / SHARD)
    rerecord(checkpoint, 1, [SHARD])


DAMAGES = {
    "missing": (damage_missing, f"{SHARD} is missing"),
    "short": (damage_short, f"{SHARD} has .* it is truncated"),
    "foreign": (damage_foreign, f"{SHARD} is not the file that this checkpoint wrote"),
    # 729 rows over 2 ranks: rank 1's first is 365, the fifth element lies in its first row.
    "nan": (damage_nan, "NaN or infinity in fp32 of memories.0.values.weight.*row 365"),
}


def errors_of(rank: int, world_size: int, legs: list[Leg]) -> list[str]:
    """What loading each leg's checkpoint raises on this rank."""
    found = []
    for leg in legs:
        engine = build_engine(leg, rank, world_size)
        with pytest.raises(ValueError) as error:
            engine.load(latest(leg.run_dir))
        found.append(str(error.value))
        engine.engine.destroy()
    return found


@pytest.mark.dist
def test_damage_stops_every_rank_with_the_reason(leg: Leg, tmp_path: Path) -> None:
    """On the exact path and on the elastic one (columns), one process included."""
    legs: list[Leg] = []
    messages: list[Any] = []
    for name, (damage, message) in DAMAGES.items():
        shutil.copytree(leg.run_dir, tmp_path / name)
        checkpoint = latest(tmp_path / name)
        damage(checkpoint, leg)
        exact = replace(leg, run_dir=tmp_path / name)
        legs += [exact, replace(exact, overrides=("memory.partition=dimension-wise",))]
        messages += [message, message]
        with pytest.raises(ValueError, match=message):
            load_model(checkpoint)
    by_rank = run_ranks(errors_of, 2, legs)
    for i, message in enumerate(messages):
        for errors in by_rank:
            with pytest.raises(ValueError, match=message):
                raise ValueError(errors[i])


@pytest.mark.dist
def test_another_model_is_refused(leg: Leg, tmp_path: Path) -> None:
    """A record of other shapes does not load."""
    shutil.copytree(leg.run_dir, tmp_path / "run")
    checkpoint = latest(tmp_path / "run")
    parameters = CheckpointReader(checkpoint).parameters
    parameters["head.weight"] = replace(parameters["head.weight"], shape=(65, 32))
    write_layout(checkpoint, 2, parameters)
    errors = run_ranks(errors_of, 1, [replace(leg, run_dir=tmp_path / "run")])[0]
    assert "holds head.weight as (65, 32), this model has (64, 32)" in errors[0]
