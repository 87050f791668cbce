"""``train --extend`` and ``train --init-from`` as people type them: real runs, weights compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import RUN_OVERRIDES
from tests.dist.launching import run_verb
from ultramem_ds.checkpoint.directory import find_checkpoint
from ultramem_ds.checkpoint.parameters import parameter_records
from ultramem_ds.checkpoint.reader import CheckpointReader
from ultramem_ds.checkpoint.weights import RunWeights
from ultramem_ds.config.load import load_run_config
from ultramem_ds.optim.schedule import dense_lr, value_lr
from ultramem_ds.telemetry.metrics import read_lines

pytestmark = pytest.mark.dist


def masters(run_dir: Path) -> dict[str, Tensor]:
    """All fp32 masters of a run's latest checkpoint."""
    weights = RunWeights(find_checkpoint(run_dir))
    found = {}
    for name, record in parameter_records(load_run_config(run_dir / "config.json")).items():
        found[name] = torch.empty(record.block.num_rows, record.block.num_columns)
        weights.read(name, record.block, found[name])
    return found


def train(
    run_dir: Path,
    data: Path,
    *words: str,
    options: Sequence[str] = (),
    nproc: int = 0,
    kind: str = "ultramem",
) -> str:
    result = run_verb(
        "train", "--preset", f"{kind}-debug", "--data", str(data), "--run-dir", str(run_dir),
        *options, *RUN_OVERRIDES, *words, nproc=nproc,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def history(run_dir: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run_dir / "config.json").read_text())["history"]
    return found


def test_extend(prepared: Path, trained: Path, tmp_path: Path) -> None:
    """Another learning rate, weight decay, length and seed of the data, from step 2 on."""
    words = ["optim.lr=0.004", "train.max_steps=6", "train.seed=1", "train.log_every=1"]
    runs = {}
    for decay in (0.0, 0.5):
        run_dir = runs[decay] = Path(shutil.copytree(trained, tmp_path / f"decay-{decay}"))
        decay_word = f"optim.weight_decay={decay}"
        log = train(
            run_dir, prepared, *words, decay_word, "train.stop_at_step=3", options=["--extend"]
        )
        for key in ("optim.lr", "train.max_steps", "train.seed", "optim.weight_decay", "data "):
            assert key in log.partition("extended from step 2 on: ")[2].splitlines()[0], log
        assert "changed from step 2 on: train.log_every" in log
        (entry,) = history(run_dir)
        assert entry["step"] == 2
        assert entry["changed"]["optim.weight_decay"] == [0.1, decay]
        assert entry["changed"]["train.max_steps"] == [4, 6]
    config = load_run_config(runs[0.5] / "config.json")
    record = read_lines(runs[0.5] / "metrics.jsonl")[-1]
    lr, lr_tables = (rate(2, 6, config.optim) for rate in (dense_lr, value_lr))
    assert (record["step"], record["lr"]) == (3, pytest.approx(lr))
    # One AdamW step differs by -lr * decay * weight alone: the new decay counts, in every group.
    before, without, decayed = masters(trained), masters(runs[0.0]), masters(runs[0.5])
    tables = [name for name, record in parameter_records(config).items() if record.is_table]
    assert tables
    for name, weight in before.items():
        rate = 0.0 if "norm" in name else lr_tables if name in tables else lr
        expected = -rate * 0.5 * weight
        # fp32 weights of about 1 are rounded twice; the term itself is lr / 2 of them.
        torch.testing.assert_close(decayed[name] - without[name], expected, rtol=1e-2, atol=3e-7)

    # The extended run is a run like any other now: the same settings resume without the option.
    log = train(runs[0.5], prepared, *words, "optim.weight_decay=0.5", "train.stop_at_step=0")
    assert "extended" not in log
    assert read_lines(runs[0.5] / "metrics.jsonl")[-1]["step"] == 6
    assert [entry["step"] for entry in history(runs[0.5])] == [2, 3]  # stop_at_step changed at 3


def started_run(source: Path, data: Path, run_dir: Path, kind: str, *words: str) -> str:
    # A step so small that fp32 weights do not move: what the run started from is what it saves.
    # Tables too: product keys train theirs at a rate of its own.
    still = ["optim.lr=1e-30", "optim.value_lr_schedule=decay", "train.stop_at_step=1"]
    options = ["--init-from", str(source)]
    return train(run_dir, data, *still, *words, options=options, nproc=2, kind=kind)


def assert_fresh_copy(source: Path, run_dir: Path) -> None:
    theirs, ours = masters(source), masters(run_dir)
    assert theirs.keys() == ours.keys()
    for name in theirs:
        assert torch.equal(theirs[name], ours[name]), name
    reader = CheckpointReader(find_checkpoint(run_dir))
    assert reader.step() == 1
    # Directions follow their core from where they were: the same sign, no other quadrant. Those of
    # the source are of the core before its last update, of about a hundredth of the core.
    for name, value in CheckpointReader(find_checkpoint(source)).buffers().items():
        torch.testing.assert_close(reader.buffers()[name], value, rtol=0.0, atol=0.05)


@pytest.mark.slow
def test_init_from_a_run_of_one_rank(prepared: Path, trained: Path, tmp_path: Path) -> None:
    """Other world size, scheme, precision, dropout, batch, sequence length and seed."""
    run_dir = tmp_path / "tuned"
    words = "memory.partition=dimension-wise train.precision=bf16 model.dropout=0.0 train.seed=5"
    words += " train.global_batch_size=8 model.seq_len=16"
    log = started_run(trained, prepared, run_dir, "ultramem", *words.split())
    assert f"starting from the weights of {trained}, step 2" in log
    assert history(run_dir) == [{"step": 0, "init_from": str(trained), "init_step": 2}]
    assert_fresh_copy(trained, run_dir)
    # The same command again resumes; a run that started elsewhere does not take the option.
    further = [*words.split(), "train.stop_at_step=2"]
    log = started_run(trained, prepared, run_dir, "ultramem", *further)
    assert "resuming" in log and "starting from" not in log
    other = Path(shutil.copytree(trained, tmp_path / "other"))
    refused = run_verb(
        "train", "--preset", "ultramem-debug", "--data", str(prepared), "--run-dir", str(other),
        "--init-from", str(trained), *RUN_OVERRIDES,
    )  # fmt: skip
    assert refused.returncode == 2 and "did not start from" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "moe", "pkm"])
def test_init_from_other_kinds(prepared: Path, tmp_path: Path, kind: str) -> None:
    """ZeRO-1, ZeRO-2 with experts over two ranks, ZeRO-3 with product keys."""
    source, run_dir = tmp_path / "source", tmp_path / "tuned"
    shape = ["memory.value_dim=32"] if kind == "pkm" else []  # product keys project no values
    train(source, prepared, "train.stop_at_step=2", *shape, kind=kind)
    started_run(source, prepared, run_dir, kind, "train.seed=5", *shape)
    assert_fresh_copy(source, run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("partition", ["number-wise", "dimension-wise"])
def test_init_from_an_exported_directory(
    prepared: Path, trained: Path, tmp_path: Path, partition: str
) -> None:
    """What ``export`` wrote for transformers, bit by bit; cut into two files."""
    exported, run_dir = tmp_path / "exported", tmp_path / "tuned"
    words = ["--checkpoint", str(trained), "--output", str(exported), "--dtype", "fp32"]
    result = run_verb("export", *words, "--max-shard-size", "100KB")
    assert result.returncode == 0, result.stderr
    scheme = f"memory.partition={partition}"
    log = started_run(exported, prepared, run_dir, "ultramem", "train.seed=5", scheme)
    assert f"starting from the weights of {exported}, step 2" in log
    assert_fresh_copy(trained, run_dir)


@pytest.mark.slow
def test_training_goes_on_from_an_imported_run(
    prepared: Path, trained: Path, tmp_path: Path
) -> None:
    """``export``, ``import`` into two ranks, then both ways on: the same directory and a new one."""
    exported, imported, tuned = (tmp_path / name for name in ("exported", "imported", "tuned"))
    for verb, source, output, *words in (
        ("export", ["--checkpoint", str(trained)], exported, "--dtype", "fp32"),
        ("import", ["--input", str(exported)], imported, "--world-size", "2"),
    ):
        result = run_verb(verb, *source, "--output", str(output), *words)
        assert result.returncode == 0, result.stderr
    started_run(imported, prepared, tuned, "ultramem", "train.seed=5")
    assert_fresh_copy(trained, tuned)
    # In place, on one rank: from step 0, under another learning rate and other data's order.
    words = ["optim.lr=1e-30", "train.seed=5", "train.stop_at_step=1"]
    log = train(imported, prepared, *words, options=["--extend"])
    assert "extended from step 0 on: " in log
    assert_fresh_copy(trained, imported)
    # From there on it is a run like any other.
    train(imported, prepared, "optim.lr=0.002", "train.seed=5", options=["--extend"])
    assert [r["step"] for r in read_lines(imported / "metrics.jsonl")][-1] == 4
    assert not torch.equal(*(masters(run)["head.weight"] for run in (imported, trained)))
