"""Everything that is averaged over ranks and micro-batches, against one rank with all tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.elastic_series import Leg, build_engine, micro_batches
from ultramem_ds.testing.distributed import run_ranks

pytestmark = pytest.mark.dist

STEPS = 4
SAMPLED = {"recall"}  # of 4 tokens per forward: more ranks look at more and other tokens


def results_body(rank: int, world_size: int, legs: list[Leg]) -> list[list[dict[str, Any]]]:
    """What every step of each leg reports, but for sampled numbers."""
    found = []
    for run in legs:
        engine = build_engine(run, rank, world_size)
        batches = micro_batches(run.config, engine.ranks, 0)
        steps = []
        for step in range(STEPS):
            result = engine.train_step(batches, step)
            kept = {k: v for k, v in result.statistics.items() if k.split("/")[-1] not in SAMPLED}
            steps.append(
                {
                    "loss": result.loss,
                    "aux_loss": result.aux_loss,
                    "balance_loss": result.balance_loss,
                    "grad_norm": result.grad_norm,
                    "expert_share": torch.tensor(result.expert_share),
                    **kept,
                }
            )
        found.append(steps)
    return found


def ultramem(sequences_per_forward: int, *overrides: str) -> Leg:
    """One forward per rank and step; eq. 12's margin is low enough for the term to be there."""
    sizes = (f"train.micro_batch_size={sequences_per_forward}", "memory.stats_every=2")
    margin = ("memory.aux_loss_weight=0.1", "memory.aux_loss_margin=0.0")
    return leg("ultramem", *sizes, *margin, *overrides)


def moe(*overrides: str) -> Leg:
    """The balance loss is of a forward's tokens: all ranks take forwards of two sequences."""
    sizes = ("moe.num_experts=3", "memory.stats_every=2")
    return leg("moe", *sizes, "moe.balance_loss_weight=0.1", *overrides)


def leg(kind: str, *overrides: str) -> Leg:
    return Leg(kind=kind, begin=0, end=STEPS, run_dir=Path(), overrides=overrides, save=False)


def test_ranks_sub_groups_and_accumulation_report_what_one_rank_does() -> None:
    """Losses, auxiliary and balance terms, experts' shares, the memory layers' statistics."""
    alone = run_ranks(results_body, 1, [ultramem(8), moe()])[0]
    on_two = run_ranks(results_body, 2, [ultramem(4, "memory.shard_group_size=1"), moe()])
    groups = ultramem(2, "memory.shard_group_size=2")
    row_sparse = ultramem(
        2, "memory.shard_group_size=2", "memory.table_optimizer=row-sparse-catch-up"
    )
    in_pairs = moe("moe.expert_parallel_size=2")
    on_four = run_ranks(results_body, 4, [groups, row_sparse, moe(), in_pairs])
    names = alone[0][1].keys() - alone[0][0].keys()
    assert {"layer_0/rows_touched", "layer_0/output_std", "layer_0/slots_kl"} <= names
    assert {f"grad_signal/{kind}" for kind in ("tables", "keys", "queries", "dense")} <= names
    assert {"grad_signal/experts", "grad_signal/dense"} <= alone[1][1].keys()
    assert alone[0][0]["aux_loss"] > 0 and alone[1][0]["balance_loss"] > 0
    comparisons = [
        *((f"two ranks, {i}", ranks[i], alone[i]) for ranks in on_two for i in range(2)),
        *(
            (f"four ranks, {i}", ranks[i], alone[i // 2])
            for ranks in on_four
            for i in range(4)
        ),
    ]
    for where, found, expected in comparisons:
        for step, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
            if where == "four ranks, 1":  # rows that were not looked up catch up later
                mine, theirs = (
                    {k: v for k, v in values.items() if "/value_" not in k}
                    for values in (mine, theirs)
                )
            torch.testing.assert_close(
                mine,
                theirs,
                rtol=1e-5,  # fp32 sums in another order, four steps of Adam
                atol=1e-6,
                msg=lambda text, where=(where, step): f"{where}: {text}",
            )
