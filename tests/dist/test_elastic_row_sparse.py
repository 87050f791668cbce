"""The row-sparse table optimizer against dense AdamW, over ranks, schemes and checkpoints."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.dist.elastic_series import Leg, build_engine, micro_batches, run_legs
from ultramem_ds.optim.decision import Decision
from ultramem_ds.testing.distributed import run_ranks
from ultramem_ds.watch.desync import checksum
from ultramem_ds.zero.replicated import replicated_blocks

DENSE, LAZY, CATCH_UP = (
    f"memory.table_optimizer={form}" for form in ("dense", "row-sparse", "row-sparse-catch-up")
)
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


@pytest.mark.dist
def test_every_optimizer_with_any_number_of_copies(tmp_path: Path) -> None:
    """Four, two and one copies of the tables on four ranks: the series of one rank.

    A copy's tokens look up about 0.3 of the rows in a step, so that most rows of most steps are
    stepped in copies that did not look them up.
    """
    optimizers, sizes = (DENSE, LAZY, CATCH_UP), (1, 2, 4)
    alone = run_ranks(run_legs, 1, [leg(tmp_path, optimizer) for optimizer in optimizers])[0]
    cases = list(itertools.product(optimizers, sizes))
    legs = [leg(tmp_path, form, ROWS, f"memory.shard_group_size={n}") for form, n in cases]
    for (form, size), series in zip(cases, run_ranks(run_legs, 4, legs)[0]):
        torch.testing.assert_close(
            torch.tensor(series),
            torch.tensor(alone[optimizers.index(form)]),
            rtol=1e-5,  # fp32 sums in another order, amplified by six steps
            atol=1e-6,
            msg=lambda text, where=(form, size): f"{where}: {text}",
        )


def copies_body(rank: int, world_size: int, run: Leg) -> list[dict[str, int]]:
    """Checksums of the tables after steps, a forward of its own, a refused step, and steps."""
    engine = build_engine(run, rank, world_size)
    batches = micro_batches(run.config, engine.ranks, 0)
    gate = engine.gate.judge
    judge = gate.judge
    found = []
    for step in range(6):
        if step == 2:
            torch.manual_seed(rank)  # every copy looks at rows of its own
            with torch.no_grad():
                engine.model(torch.randint(run.config.model.vocab_size, (1, 17)))
        refuse = step == 3
        gate.judge = (lambda norm: Decision(norm, False, 0.0)) if refuse else judge
        assert engine.train_step(batches, step).decision.apply != refuse
        blocks = replicated_blocks(engine.model, engine.tables)
        found.append({name: checksum(block) for name, block in blocks.items()})
    return found


@pytest.mark.dist
def test_copies_of_a_table_stay_equal_to_the_last_bit(tmp_path: Path) -> None:
    """What the desync guard counts on: also through evaluation and a step that is not taken."""
    run = leg(tmp_path, CATCH_UP, ROWS, "memory.shard_group_size=1")
    first, second = run_ranks(copies_body, 2, run)
    assert len(first[0]) == 1 and first[1] != first[0]
    assert first == second


def accumulation_body(rank: int, world_size: int, run: Leg) -> list[tuple[float, float, int]]:
    """Loss, norm and bytes of row gradients at the end of each step."""
    engine = build_engine(run, rank, world_size)
    assert engine.tables is not None
    (shard,) = engine.tables.shards
    batches = micro_batches(run.config, engine.ranks, 0)
    held: list[int] = []
    take = shard.take_gradient

    def measured() -> object:
        assert not shard._pending
        held.append(shard.gradients.num_bytes)
        return take()

    shard.take_gradient = measured
    results = [engine.train_step(batches, step) for step in range(3)]
    return [(r.loss, r.grad_norm, size) for r, size in zip(results, held)]


@pytest.mark.dist
def test_accumulated_gradients_take_no_more_than_the_shard(tmp_path: Path) -> None:
    """32 micro-batches look up 4096 rows of 729: the sum holds each row once."""
    shared = (LAZY, "train.global_batch_size=32")
    runs = [leg(tmp_path, *shared, f"train.micro_batch_size={size}") for size in (32, 1)]
    whole, parts = (run_ranks(accumulation_body, 1, run)[0] for run in runs)
    rows, width = 729, 16
    for (loss, norm, _), (loss_parts, norm_parts, held) in zip(whole, parts):
        assert held <= rows * (4 * width + 4)
        assert (loss_parts, norm_parts) == pytest.approx((loss, norm), rel=1e-5)
