"""A stored slot permutation moves with a checkpoint, to the last integer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.dist.elastic_series import Leg, build_engine, micro_batches
from ultramem_ds.checkpoint.directory import latest_checkpoint
from ultramem_ds.infer.load import load_model
from ultramem_ds.testing.distributed import run_ranks

pytestmark = pytest.mark.dist


def permutation(model: Any) -> Tensor:
    index: Tensor = model.memory_layers[0].shuffle.index
    return index


def save_body(rank: int, world_size: int, run: Leg) -> tuple[Tensor, float]:
    """Another permutation than a new model's, two steps, a checkpoint, and the next step's loss."""
    engine = build_engine(run, rank, world_size)
    index = permutation(engine.model)
    index.copy_(index.flip(0))
    batches = micro_batches(run.config, engine.ranks, 0)
    for step in range(2):
        engine.train_step(batches, step)
    engine.save(run.run_dir, 2, "test data", wait=True)
    return index.clone(), engine.train_step(batches, 2).loss


def load_body(rank: int, world_size: int, run: Leg) -> tuple[Tensor, float]:
    engine = build_engine(run, rank, world_size)
    latest = latest_checkpoint(run.run_dir)
    assert latest is not None
    engine.load(latest)
    batches = micro_batches(run.config, engine.ranks, 2)
    return permutation(engine.model), engine.train_step(batches, 2).loss


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stored_permutation_moves_between_world_sizes(precision: str, tmp_path: Path) -> None:
    """From 2 ranks to 1 and into the one-process model; 2916 entries, bf16 knows 257 integers."""
    run = Leg(
        kind="ultramem",
        begin=0,
        end=2,
        run_dir=tmp_path,
        overrides=("memory.shuffle=stored", f"train.precision={precision}"),
    )
    (expected, loss), _ = run_ranks(save_body, 2, run)
    assert expected.dtype == torch.int64
    assert sorted(expected.tolist()) == list(range(4 * 27 * 27))
    found, continued = run_ranks(load_body, 1, replace(run, begin=2, end=3))[0]
    assert torch.equal(found, expected)
    assert continued == pytest.approx(loss, rel=1e-5 if precision == "fp32" else 2e-2)
    assert torch.equal(permutation(load_model(tmp_path)), expected)
