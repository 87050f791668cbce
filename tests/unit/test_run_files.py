"""Checkpoint directories and metrics files: what a crash leaves is recognised."""

from __future__ import annotations

import json
import math
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from ultramem_ds.checkpoint import directory as checkpoints
from ultramem_ds.checkpoint.record import write_layout, write_rank_layout
from ultramem_ds.telemetry.metrics import MetricsWriter, read_lines
from ultramem_ds.telemetry.report import median_phases_ms, read_run, write_report
from ultramem_ds.utils.files import write_json
from ultramem_ds.utils.lines import LineFile


def state(step: int) -> checkpoints.TrainerState:
    return checkpoints.TrainerState(
        step=step,
        consumed_samples=step * 8,
        data_fingerprint="f",
        world_size=2,
        partition="number-wise",
        zero_stage=3,
        config={},
    )


def seal(staging: Path) -> None:
    """What one rank without parameters records."""
    write_rank_layout(staging, 0, {}, ["weights.pt"])
    write_layout(staging, 1, {})


def save(run_dir: Path, step: int, keep_last: int = 2, keep_every: int = 0) -> Path:
    staging = checkpoints.begin(run_dir, step)
    (staging / "weights.pt").write_bytes(b"x" * step)
    return checkpoints.publish(run_dir, state(step), seal, keep_last, keep_every)


def test_latest_moves_and_old_ones_go(tmp_path: Path) -> None:
    assert checkpoints.latest_checkpoint(tmp_path) is None
    for step in (5, 10, 15):
        save(tmp_path, step)
    latest = checkpoints.latest_checkpoint(tmp_path)
    assert latest is not None and latest.name == "step-00000015"
    assert checkpoints.read_trainer_state(latest) == state(15)
    names = {path.name for path in latest.parent.iterdir()}
    assert names == {"latest", "step-00000010", "step-00000015"}
    assert checkpoints.find_checkpoint(tmp_path) == latest
    assert checkpoints.find_checkpoint(latest) == latest
    assert checkpoints.run_dir_of(latest) == tmp_path


def test_a_half_written_checkpoint_is_not_the_latest(tmp_path: Path) -> None:
    first = save(tmp_path, 5)
    staging = first.parent / checkpoints.staging_tag(10)
    staging.mkdir()
    (staging / "weights.pt").write_bytes(b"torn")
    assert checkpoints.latest_checkpoint(tmp_path) == first
    save(tmp_path, 15)
    assert not staging.exists()


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 5)
    assert checkpoints.latest_checkpoint(tmp_path) == save(tmp_path, 5)


def test_missing_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such directory"):
        checkpoints.find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="neither a checkpoint nor a run"):
        checkpoints.find_checkpoint(tmp_path)
    latest = save(tmp_path, 5)
    (latest / "trainer.json").unlink()
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        checkpoints.latest_checkpoint(tmp_path)


def test_metrics_past_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 1)
    for step in range(1, 6):
        writer.write_step({"step": step, "loss": 1.0 / step, "expert_share": [[0.5, 0.5]]})
    writer.write_validation(5, {"all": 2.0})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    assert [r["step"] for r in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    writer = MetricsWriter(tmp_path, 4)
    writer.write_step({"step": 4, "loss": 9.0})
    writer.close()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in records][-2:] == [(3, 1 / 3), (4, 9.0)]
    assert read_lines(tmp_path / "validation.jsonl") == []


def strict(text: str) -> Any:
    """Parse JSON as other programs do: NaN is no word of it."""

    def refuse(word: str) -> None:
        raise AssertionError(word)

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    """Auxiliary terms of a skipped step, statistics, validation of a model that has diverged."""
    writer = MetricsWriter(tmp_path, 1)
    writer.write_step({"step": 1, "aux_loss": math.nan, "expert_share": [[math.inf, 1.0]]})
    writer.write_validation(1, {"all": math.nan, "a": 2.0})
    writer.close()
    (step,) = map(strict, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert step == {"step": 1, "aux_loss": None, "expert_share": [[None, 1.0]]}
    (validation,) = map(strict, (tmp_path / "validation.jsonl").read_text().splitlines())
    assert validation == {"step": 1, "all": None, "a": 2.0}
    write_json(tmp_path / "summary.json", {"val_loss": math.nan, "nested": [{"x": (-math.inf,)}]})
    summary = strict((tmp_path / "summary.json").read_text())
    assert summary == {"val_loss": None, "nested": [{"x": [None]}]}


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ValueError, match="metrics.jsonl:2"):
        read_lines(path)


def test_lines_wait_for_space(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole lines only, in order, none lost once there is room again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    lines = LineFile(tmp_path / "lines")
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does by itself
    try:
        lines.write("first")
        resource.setrlimit(resource.RLIMIT_FSIZE, (9, hard))
        lines.write("second")
        lines.write("third")
        assert (tmp_path / "lines").read_text() == "first\n"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    lines.write("fourth")
    lines.close()
    assert (tmp_path / "lines").read_text() == "first\nsecond\nthird\nfourth\n"
    assert capsys.readouterr().err.count("Its lines wait in memory") == 1


def test_a_report_shows_losses_times_and_memory(trained: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(trained, tmp_path / "broken"))
    lines = [json.loads(line) for line in (broken / "metrics.jsonl").read_text().splitlines()]
    lines[-1]["loss"] = None  # a skipped step
    (broken / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (broken / "summary.json").unlink()
    written = write_report([trained, broken], tmp_path / "report")
    assert {path.name for path in written} == {"report.md", "losses.png", "speed.png"}
    assert all(path.stat().st_size > 1000 for path in written if path.suffix == ".png")
    text = (tmp_path / "report" / "report.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith(("| run ", "| broken"))]
    assert [line.split()[1] for line in rows].count("broken") == 2
    last = read_lines(trained / "metrics.jsonl")[-1]
    assert f"{last['loss']:.4f}" in text
    forward = median_phases_ms(read_run(trained))["forward"]
    assert f"{forward:,.1f}" in text and forward > 0
