"""Checkpoints continue at another world size, scheme, sub-group size and ZeRO stage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.dist.elastic_series import Leg, run_legs
from ultramem_ds.config.deepspeed import CONFIG_DIR
from ultramem_ds.testing.distributed import run_ranks

# fp32 sums over ranks and micro-batches differ in their order: some 1e-7 per step, growing slowly.
TOLERANCE = dict(rtol=1e-5, atol=1e-6)

# name -> model kind and what changes on the way 2 ranks -> 1 rank -> 4 ranks
ROUTES = {
    "dense": ("dense", (), ()),
    "pkm": ("pkm", (), ()),
    "moe": ("moe", (), ()),
    "number-wise to dimension-wise": (
        "ultramem",
        ("memory.partition=number-wise",),
        ("memory.partition=dimension-wise",),
    ),
    "dimension-wise to pooled sub-groups": (
        "ultramem",
        ("memory.partition=dimension-wise",),
        ("memory.partition=owner-pooled", "memory.shard_group_size=2"),
    ),
    "replicas to columns in sub-groups": (
        "pkm",
        ("memory.partition=number-wise", "memory.shard_group_size=1"),
        ("memory.partition=dimension-wise", "memory.shard_group_size=2"),
    ),
}


@pytest.mark.dist
def test_two_one_four_ranks_continue_the_series(tmp_path: Path) -> None:
    """Losses and norms of 2 ranks, then 1, then 4 are those of 1 rank throughout."""
    legs = [
        Leg(kind=kind, begin=0, end=2, run_dir=tmp_path / name, overrides=before)
        for name, (kind, before, _) in ROUTES.items()
    ]
    alone = {
        kind: Leg(kind=kind, begin=0, end=6, run_dir=tmp_path / "alone" / kind, save=False)
        for kind in ("dense", "pkm", "moe", "ultramem")
    }
    first = run_ranks(run_legs, 2, legs)[0]
    one = [replace(leg, begin=2, end=4, overrides=()) for leg in legs]
    second = run_ranks(run_legs, 1, [*one, *alone.values()])[0]
    whole = dict(zip(alone, second[len(legs) :]))
    four = [
        replace(leg, begin=4, end=6, overrides=after)
        for leg, (_, _, after) in zip(legs, ROUTES.values())
    ]
    third = run_ranks(run_legs, 4, four)[0]
    for i, (name, (kind, _, _)) in enumerate(ROUTES.items()):
        moved = torch.tensor(first[i] + second[i] + third[i])
        torch.testing.assert_close(
            moved, torch.tensor(whole[kind]), msg=lambda m, name=name: f"{name}: {m}", **TOLERANCE
        )


@pytest.mark.dist
def test_scheme_and_stage_change_at_the_same_world_size(tmp_path: Path) -> None:
    """At 2 ranks: rows to columns, ZeRO-1 to 3 to 2, and an unchanged layout to the last digit."""
    rows, columns = ("memory.partition=number-wise",), ("memory.partition=dimension-wise",)
    moved = Leg(kind="ultramem", begin=0, end=2, run_dir=tmp_path / "moved", overrides=rows)
    same = replace(moved, run_dir=tmp_path / "same")
    dense = Leg(kind="dense", begin=0, end=2, run_dir=tmp_path / "dense")
    legs = [
        replace(moved, end=4, run_dir=tmp_path / "rows", save=False),
        replace(dense, end=6, run_dir=tmp_path / "whole", save=False),
        moved,
        replace(moved, begin=2, end=4, overrides=columns),
        same,
        replace(same, begin=2, end=4),
        dense,
        replace(dense, begin=2, end=4, deepspeed_file=CONFIG_DIR / "dense_zero3.json"),
        replace(dense, begin=4, end=6, deepspeed_file=CONFIG_DIR / "dense_zero2.json"),
    ]
    rows_alone, dense_alone, *series = run_ranks(run_legs, 2, legs)[0]
    torch.testing.assert_close(
        torch.tensor(series[0] + series[1]), torch.tensor(rows_alone), **TOLERANCE
    )
    assert series[2] + series[3] == rows_alone
    torch.testing.assert_close(
        torch.tensor(series[4] + series[5] + series[6]), torch.tensor(dense_alone), **TOLERANCE
    )
