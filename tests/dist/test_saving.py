"""Saving: in the background as in the foreground, on a full disk, and what loading falls back to."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.dist.elastic_series import Leg, build_engine, micro_batches
from ultramem_ds.checkpoint.record import LAYOUT
from ultramem_ds.testing.distributed import run_ranks
from ultramem_ds.checkpoint import directory as checkpoints
from ultramem_ds.train.engine import TrainEngine

pytestmark = pytest.mark.dist

BACKGROUND = ("train.background_save=true",)


def leg_of(kind: str, run_dir: Path, overrides: tuple[str, ...] = ()) -> Leg:
    return Leg(kind=kind, begin=0, end=0, run_dir=run_dir, overrides=overrides)


def train(engine: TrainEngine, leg: Leg, begin: int, end: int) -> list[tuple[float, float]]:
    """Steps ``begin`` to ``end``, with the saver's turn after each as in the training loop."""
    batches = micro_batches(leg.config, engine.ranks, begin)
    found = []
    for step in range(begin, end):
        result = engine.train_step(batches, step)
        engine.advance_save()
        found.append((result.loss, result.grad_norm))
    return found


# --- background saves ---------------------------------------------------------------------------


def save_twice(rank: int, world_size: int, leg: Leg) -> None:
    """Two steps, each saved, and training that goes on until the files are written."""
    engine = build_engine(leg, rank, world_size)
    for step in (1, 2):  # the second save refills the first one's copies
        train(engine, leg, step - 1, step)
        engine.save(leg.run_dir, step, "test data")
    assert engine.saver.in_progress == leg.config.train.background_save
    for step in range(2, 60):
        train(engine, leg, step, step + 1)
        if not engine.saver.in_progress:
            break
    assert not engine.saver.in_progress  # finished by itself, between steps
    engine.engine.destroy()


@pytest.mark.parametrize("kind", ["moe", "row-sparse"])
def test_background_files_are_the_foreground_s(kind: str, tmp_path: Path) -> None:
    """Byte by byte, although the weights move while the files are written."""
    overrides: tuple[str, ...] = ("train.max_steps=60",)
    if kind == "row-sparse":
        kind, overrides = "ultramem", (*overrides, "memory.table_optimizer=row-sparse-catch-up")
    foreground = leg_of(kind, tmp_path / "foreground", overrides)
    background = leg_of(kind, tmp_path / "background", (*overrides, *BACKGROUND))
    # In processes of their own: DeepSpeed numbers parameters through, and saves the numbers.
    run_ranks(save_twice, 2, foreground)
    run_ranks(save_twice, 2, background)
    for step in (1, 2):
        here, there = (
            checkpoints.checkpoints_dir(leg.run_dir) / checkpoints.tag_of(step)
            for leg in (foreground, background)
        )
        names = {p.name for p in here.iterdir()}
        assert names == {p.name for p in there.iterdir()} and len(names) > 6
        for name in names - {LAYOUT, checkpoints.TRAINER}:  # the configurations differ by the key
            assert (here / name).read_bytes() == (there / name).read_bytes(), name


# --- a full disk --------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(directory)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs here")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def outlive_a_full_disk(rank: int, world_size: int, leg: Leg) -> dict[str, Any]:
    """Save, fill the disk, fail to save, train on, make room, save again."""
    engine = build_engine(leg, rank, world_size)
    filler = leg.run_dir / "filler"
    failures, warnings = [], io.StringIO()
    series = train(engine, leg, 0, 1)
    engine.save(leg.run_dir, 1, "test data", wait=True)
    if rank == 0:
        with open(filler, "wb") as file:
            file.write(bytes(shutil.disk_usage(leg.run_dir).free - 200_000))  # a part still fits
    series += train(engine, leg, 1, 2)
    with contextlib.redirect_stderr(warnings):
        engine.save(leg.run_dir, 2, "test data")
        for step in range(2, 40):
            series += train(engine, leg, step, step + 1)
            if not engine.saver.in_progress:
                break
    failures.append(engine.saver.failure)
    with pytest.raises(OSError, match="could not be saved") as error:
        engine.save(leg.run_dir, len(series), "test data", wait=True)  # as at the end of a run
    failures.append(str(error.value))
    engine.comm.barrier()  # rank 0 removes what was half-written
    here = sorted(os.listdir(checkpoints.checkpoints_dir(leg.run_dir)))
    engine.comm.barrier()
    if rank == 0:
        filler.unlink()
    engine.comm.barrier()
    engine.save(leg.run_dir, len(series), "test data", wait=True)
    engine.engine.destroy()
    return {
        "failures": failures,
        "warnings": warnings.getvalue(),
        "left": here,
        "series": series,
    }


@pytest.mark.parametrize("overrides", [(), BACKGROUND])
def test_a_full_disk_stops_no_training(
    overrides: tuple[str, ...], small_disk: Path
) -> None:
    leg = leg_of("ultramem", small_disk, (*overrides, "train.max_steps=60"))
    by_rank = run_ranks(outlive_a_full_disk, 2, leg)
    for found in by_rank:
        for text in found["failures"]:
            assert "could not be saved: [Errno 28] No space left on device" in text
        assert "step-00000001" in found["left"]  # whole, as resuming shows below
        assert not [name for name in found["left"] if "tmp" in name or name == "step-00000002"]
        assert found["series"] == by_rank[0]["series"]
    warnings = by_rank[0]["warnings"]
    assert by_rank[1]["warnings"] == ""
    assert warnings.count("WARNING: checkpoint of step 2 could not be saved") == 1
    assert "the last good checkpoint is step-00000001" in warnings
    latest = checkpoints.latest_checkpoint(small_disk)
    assert latest is not None and latest.name == checkpoints.tag_of(len(by_rank[0]["series"]))
    assert set(run_ranks(verified, 2, latest)) == {""}
    assert set(run_ranks(verified, 2, latest.with_name("step-00000001"))) == {""}


def verified(rank: int, world_size: int, checkpoint: Path) -> str:
    """Why a checkpoint cannot be used; nothing if it can."""
    from ultramem_ds.checkpoint.reader import CheckpointReader

    try:
        CheckpointReader(checkpoint).verify(rank, world_size)
    except ValueError as error:
        return str(error)
    return ""


# --- falling back -------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    """Flip one bit."""
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


SHARD = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    # In the middle of the file lies nothing but numbers: they stay finite, and load.
    "flipped tensor": (lambda c: flip(c / SHARD, (c / SHARD).stat().st_size // 2), SHARD),
    "truncated": (lambda c: os.truncate(c / SHARD, (c / SHARD).stat().st_size - 100), SHARD),
    "missing shard": (lambda c: (c / SHARD).unlink(), SHARD),
    "flipped rng": (lambda c: flip(c / "rng_rank_00001.pt", 2000), "rng_rank_00001.pt"),
    "flipped trainer state": (lambda c: flip(c / "trainer.json", 12), "trainer.json"),
    "flipped record": (lambda c: flip(c / LAYOUT, 200), LAYOUT),
    "flipped rank record": (lambda c: flip(c / "layout_rank_00001.json", 100), "layout_rank_00001"),
    "empty record": (lambda c: os.truncate(c / LAYOUT, 0), LAYOUT),
    "no directory": (shutil.rmtree, ""),
    "renamed": (lambda c: (c.parent / "latest").write_text("step-00000099\n"), ""),
}


def fall_back(rank: int, world_size: int, leg: Leg, broken: list[Path]) -> dict[str, Any]:
    """Save twice, train on; what each damaged copy of the run falls back to, and goes on as."""
    engine = build_engine(leg, rank, world_size)
    series = train(engine, leg, 0, 1)
    engine.save(leg.run_dir, 1, "test data")
    series += train(engine, leg, 1, 2)
    engine.save(leg.run_dir, 2, "test data")
    series += train(engine, leg, 2, 3)
    for run_dir, (damage, _) in zip(broken, DAMAGES.values()):
        if rank == 0:
            shutil.copytree(leg.run_dir, run_dir)
            damage(checkpoints.checkpoints_dir(run_dir) / "step-00000002")
    engine.comm.barrier()
    found, warnings = {}, io.StringIO()
    for run_dir in broken:
        with contextlib.redirect_stderr(warnings):
            step = engine.load_last_good(run_dir).step
        # Exactly on, in the engine that has been elsewhere meanwhile.
        found[run_dir.name] = (step, train(engine, leg, step, 3) == series[step:])
    rolled_back = engine.load_last_good(leg.run_dir, before=2).step
    with pytest.raises(ValueError, match="no checkpoint to go back to"):
        engine.load_last_good(leg.run_dir, before=1)
    engine.engine.destroy()
    return {"found": found, "rolled back": rolled_back, "warnings": warnings.getvalue()}


@pytest.mark.parametrize("kind", ["ultramem", "moe"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    kind: str, tmp_path: Path
) -> None:
    """Whichever rank notices, all go back to the same one, saying so, and continue exactly."""
    leg = leg_of(kind, tmp_path / "run", ("train.keep_last=0", "model.dropout=0.1"))
    broken = [tmp_path / name for name in DAMAGES]
    if kind == "moe":  # its optimizer files have the same names
        broken = broken[:2]
    by_rank = run_ranks(fall_back, 2, leg, broken)
    for found in by_rank:
        expected = {path.name: (1, True) for path in broken}
        if "renamed" in expected:  # the pointer is damaged, not the checkpoint
            expected["renamed"] = (2, True)
        assert found["found"] == expected
        assert found["rolled back"] == 1
    assert by_rank[1]["warnings"] == ""
    warnings = by_rank[0]["warnings"].splitlines()
    for name, (_, file) in list(DAMAGES.items())[: len(broken)]:
        mine = [line for line in warnings if f"/{name}/" in line]
        assert len(mine) == (1 if file else 0), warnings
        assert all(line.startswith("WARNING") and file in line for line in mine)


def test_keep_every_and_going_back(tmp_path: Path) -> None:
    """The pointer moved back by hand: the run goes on from there, and later ones go."""
    from tests.unit.test_run_files import save

    for step in range(1, 8):
        save(tmp_path, step, keep_last=2, keep_every=3)
    directory = checkpoints.checkpoints_dir(tmp_path)
    assert steps(directory) == [3, 6, 7]
    (directory / "latest").write_text("step-00000003\n")
    assert [p.name for p in checkpoints.resume_candidates(tmp_path)] == ["step-00000003"]
    save(tmp_path, 4, keep_last=2, keep_every=3)
    assert steps(directory) == [3, 4]
    assert json.loads((directory / "step-00000004" / "trainer.json").read_text())["step"] == 4


def steps(directory: Path) -> list[int]:
    """Steps of the checkpoints there."""
    return sorted(int(path.name[-8:]) for path in directory.glob("step-*"))


