"""What a user gets wrong costs one clear line, exit code 2, and no model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import VOCAB_SIZE
from ultramem_ds.cli.main import main

FITS = [f"model.vocab_size={VOCAB_SIZE}", "train.micro_batch_size=2"]


def complaint(
    argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> str:
    """The one line on stderr that ``argv`` earns; building a model would be an error."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr("ultramem_ds.train.loop.TrainEngine", refuse)
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error:")]
    return line


def train_argv(data: Path, run_dir: Path, *rest: str, preset: str = "dense-debug") -> list[str]:
    return ["train", "--preset", preset, "--data", str(data), "--run-dir", str(run_dir), *rest]


def test_bad_runs_are_refused_before_any_model(
    prepared: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def said(*rest: str, data: Path = prepared, preset: str = "dense-debug") -> str:
        argv = train_argv(data, tmp_path / "run", *rest, preset=preset)
        return complaint(argv, capsys, monkeypatch)

    assert "did you mean 'dense-debug'" in said(*FITS, preset="dense-debgu")
    assert "train.max_steps" in said(*FITS, "train.maxsteps=3")
    assert "nowhere" in said(*FITS, data=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty" in said(*FITS, data=tmp_path / "empty")
    assert "model.vocab_size=256" in said("model.vocab_size=256", "train.micro_batch_size=2")
    assert "no such file" in said(*FITS, "--deepspeed", str(tmp_path / "none.json"))
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    assert "not valid JSON" in said(*FITS, "--deepspeed", str(bad))
    zero3 = {"zero_optimization": {"stage": 3}}
    bad.write_text(json.dumps(zero3))
    assert "moe_zero2.json" in said(*FITS, "--deepspeed", str(bad), preset="moe-debug")
    bad.write_text(json.dumps({"zero_optimization": {"stage": 1}, "sparse_gradients": True}))
    assert "sparse_gradients" in said(*FITS, "--deepspeed", str(bad))
    bad.write_text(json.dumps({"zero_optimization": {"stage": 1, "stagee": 1}}))
    assert "stagee" in said(*FITS, "--deepspeed", str(bad))
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "cannot be divided over 3 ranks" in said(*FITS)
    assert "3 of 3 ranks" in said(*FITS, "train.global_batch_size=18", preset="moe-debug")
    assert not (tmp_path / "run").exists()


def test_bad_checkpoints_and_options(
    prepared: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = ["--data", str(prepared)]
    missing = complaint(
        ["evaluate", "--checkpoint", str(tmp_path / "x"), *data], capsys, monkeypatch
    )
    assert "no such directory" in missing
    generate = ["generate", "--checkpoint", str(tmp_path), "--prompt", "a"]
    assert "--top-p 2.0" in complaint([*generate, "--top-p", "2"], capsys, monkeypatch)
    assert "neither a checkpoint" in complaint(generate, capsys, monkeypatch)
    assert "config.json" in complaint(["report", str(tmp_path)], capsys, monkeypatch)
    assert "did you mean" in complaint(["count", "--preset", "dens-151m"], capsys, monkeypatch)
