"""``train --dry-run``: numbers that agree with real runs, and no file anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import RUN_OVERRIDES, VOCAB_SIZE
from ultramem_ds.cli.main import main
from ultramem_ds.config.load import load_config
from ultramem_ds.train.dry_run import checkpoint_bytes, dry_run, duration, problems
from ultramem_ds.train.run import prepare_run


def files(directory: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


def test_nothing_is_written_and_the_estimate_names_its_source(
    prepared: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(prepared), files(trained)
    command = ["train", "--preset", "ultramem-debug", "--data", str(prepared), "--dry-run"]
    fresh = tmp_path / "new" / "run"
    assert main([*command, "--run-dir", str(fresh), *RUN_OVERRIDES, "--world-size", "2"]) == 0
    said = capsys.readouterr().out
    assert "on 2 ranks: nothing is written" in said
    assert "4 sequences of 32 tokens = 2 ranks x 2 sequences x 1 forwards" in said
    assert "4 to do: 512 tokens" in said
    assert "measured on this machine" in said
    assert main([*command, "--run-dir", str(trained), *RUN_OVERRIDES]) == 0
    said = capsys.readouterr().out
    assert "2 to do, 2 done" in said and "median of this run's last 2 steps" in said
    assert not list(tmp_path.iterdir())
    assert (files(prepared), files(trained)) == before


def test_checkpoint_size_is_that_of_a_real_one(trained: Path) -> None:
    (checkpoint,) = trained.glob("checkpoints/step-*")
    on_disk = sum(p.stat().st_size for p in checkpoint.iterdir() if p.suffix == ".pt")
    predicted = checkpoint_bytes(load_config("ultramem-debug", RUN_OVERRIDES), 3)
    # Names, shapes and random-number states come on top: a few tens of kB.
    assert 0 <= on_disk - predicted < 150_000
    assert predicted > 500_000


def test_problems_are_named(prepared: Path, tmp_path: Path) -> None:
    config = load_config("dense-debug", [f"model.vocab_size={VOCAB_SIZE}"])
    found = dry_run(prepare_run(config, prepared, tmp_path / "run", None, 1))
    assert problems(found) == []
    full = {**found, "disk_free_bytes": found["checkpoint_bytes"] * 3 - 1}
    assert "set train.keep_last=1, or use another --run-dir" in problems(full)[0]
    fuller = {**full, "disk_free_bytes": found["checkpoint_bytes"] * 2 - 1}
    assert "keep_last" not in problems(fuller)[0]  # not one would fit beside the next
    small = {**found, "available_bytes": found["memory_bytes"]["total"] - 1}
    assert "not enough" in problems(small)[0]
    assert "use 2 ranks or this" in problems({**small, "ways_to_fit": ["2 ranks", "this"]})[0]


def test_what_offload_does_not_move_is_said(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--preset", "ultramem-debug", "--data", str(prepared), "--dry-run"]
    command += ["--run-dir", str(tmp_path / "run")]
    command += ["--deepspeed", "ultramem_zero3_cpu_offload.json"]
    words = "memory.table_optimizer=row-sparse keeps masters and moments where the tables are"
    for optimizer, said in (("dense", False), ("row-sparse", True)):
        chosen = [*RUN_OVERRIDES, f"memory.table_optimizer={optimizer}"]
        assert main([*command, *chosen]) == 0
        assert (words in capsys.readouterr().out) == said


def test_durations() -> None:
    assert duration(7) == "0:00:07"
    assert duration(3 * 86_400 + 4 * 3600 + 5 * 60 + 6) == "3d 4:05:06"
