"""Checkpoints of bf16 training move between world sizes and schemes: fp32 state to the last bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.elastic_series import Leg, build_engine, run_leg
from ultramem_ds.checkpoint.reader import CheckpointReader
from ultramem_ds.checkpoint.state import KINDS
from ultramem_ds.testing.distributed import run_ranks
from ultramem_ds.checkpoint import directory as checkpoints

BF16 = ("train.precision=bf16",)
ROWS = (*BF16, "memory.partition=number-wise")
COLUMNS = (*BF16, "memory.partition=dimension-wise")

# Beside the masters everything is bf16, of 8 bits: gradients are rounded where they are reduced,
# once per rank, so that 1, 2 and 4 ranks differ by 2^-9 relative in each element of a gradient. In
# the norm, over thousands of elements, most of that cancels; the loss follows weights that moved by
# lr times that. An uninterrupted run differs as much from one on another number of ranks.
NORM_TOLERANCE = dict(rtol=2**-8, atol=0.0)
LOSS_TOLERANCE = dict(rtol=2**-10, atol=0.0)


def legs_of_rank(rank: int, world_size: int, legs: list[Leg]) -> list[Any]:
    """The series of each leg; of a leg without steps, what is saved right after loading."""
    found: list[Any] = []
    for leg in legs:
        if leg.end > leg.begin:
            found.append(run_leg(leg, rank, world_size))
            continue
        engine = build_engine(leg, rank, world_size)
        latest = checkpoints.latest_checkpoint(leg.run_dir)
        assert latest is not None
        engine.load(latest)
        engine.save(leg.run_dir.with_name(f"{leg.run_dir.name}-again"), leg.end, "test data")
        engine.engine.destroy()
    return found


def all_state(run_dir: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Every master and moment of a run's latest checkpoint, whole."""
    latest = checkpoints.latest_checkpoint(run_dir)
    assert latest is not None
    reader = CheckpointReader(latest)
    found = {}
    for name, record in reader.parameters.items():
        for kind in KINDS:
            whole_RC = torch.empty(record.block.num_rows, record.block.num_columns)
            reader.read(name, kind, record.block, whole_RC)
            found[name, kind] = whole_RC
    return found


@pytest.mark.dist
@pytest.mark.parametrize("optimizer", ["dense", "row-sparse"])
def test_two_one_four_ranks_in_bf16(tmp_path: Path, optimizer: str) -> None:
    """Rows on 2 ranks, 1 rank, columns on 4: state exact, series within bf16's rounding."""
    adam = f"memory.table_optimizer={optimizer}"
    run_dir = tmp_path / "moved"
    two = Leg(kind="ultramem", begin=0, end=2, run_dir=run_dir, overrides=(*ROWS, adam))
    one = replace(two, begin=2, end=4)
    four = replace(two, begin=4, end=6, overrides=(*COLUMNS, adam))
    alone = replace(two, end=6, run_dir=tmp_path / "alone", save=False)

    first = run_ranks(legs_of_rank, 2, [two])[0]
    saved = all_state(run_dir)
    again = replace(one, begin=2, end=2)
    second, whole = run_ranks(legs_of_rank, 1, [again, one, alone])[0]
    run_ranks(legs_of_rank, 4, [replace(four, begin=2, end=2, run_dir=tmp_path / "moved-again")])
    for name in ("moved-again", "moved-again-again"):  # on 1 rank, then by columns on 4
        for key, value in all_state(tmp_path / name).items():
            assert torch.equal(value, saved[key]), (name, key)
    third = run_ranks(legs_of_rank, 4, [four])[0]
    moved = torch.tensor(first[0] + second + third[0])
    expected = torch.tensor(whole)
    torch.testing.assert_close(moved[:, 0], expected[:, 0], **LOSS_TOLERANCE)
    torch.testing.assert_close(moved[:, 1], expected[:, 1], **NORM_TOLERANCE)
