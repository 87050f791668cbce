"""The row-sparse table optimizer against dense AdamW, over ranks, schemes and checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.dist.elastic_series import Leg, run_legs
from ultramem_ds.testing.distributed import run_ranks

LAZY, CATCH_UP = (f"memory.table_optimizer=row-sparse{form}" for form in ("", "-catch-up"))
COLUMNS, ROWS, POOLED = (
    f"memory.partition={scheme}" for scheme in ("dimension-wise", "number-wise", "owner-pooled")
)


def leg(run_dir: Path, *overrides: str, begin: int = 0, end: int = 6, save: bool = False) -> Leg:
    """UltraMem, by default six steps without a checkpoint."""
    return Leg(
        kind="ultramem", begin=begin, end=end, run_dir=run_dir, overrides=overrides, save=save
    )


@pytest.mark.dist
def test_series_of_both_forms_over_ranks_schemes_and_checkpoints(tmp_path: Path) -> None:
    """Catch-up is dense AdamW; lazy is not, but is the same on any ranks; both resume anywhere."""
    routes = {CATCH_UP: tmp_path / "catch-up", LAZY: tmp_path / "lazy"}
    alone = run_ranks(run_legs, 1, [leg(tmp_path), *(leg(tmp_path, form) for form in routes)])[0]
    dense, catch_up, lazy = (torch.tensor(series) for series in alone)
    # The norms tell whether the tables' share is joined, the losses whether it clips. fp32
    # sums in another order, and eps in the skipped steps: 1e-5 relative over six steps.
    torch.testing.assert_close(catch_up, dense, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lazy[0], dense[0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(lazy, dense, rtol=1e-5, atol=1e-6)

    two = [leg(d, form, ROWS, end=3, save=True) for form, d in routes.items()]
    first = run_ranks(run_legs, 2, two)[0]
    four = [
        replace(one, begin=3, end=6, overrides=(form, scheme, f"memory.shard_group_size={size}"))
        for (one, form), scheme, size in zip(zip(two, routes), (COLUMNS, POOLED), (0, 2))
    ]
    second = run_ranks(run_legs, 4, four)[0]
    for expected, before, after in zip((catch_up, lazy), first, second):
        torch.testing.assert_close(torch.tensor(before + after), expected, rtol=1e-5, atol=1e-6)
