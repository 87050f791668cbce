"""The paper's 151M models at full width: on two ranks what one computes, in the memory planned."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.paper_size import CPU, PRESETS, measure, random_batches
from ultramem_ds.config.deepspeed import BatchPlan, load_deepspeed_json
from ultramem_ds.config.load import load_config
from ultramem_ds.config.schema import Config
from ultramem_ds.telemetry.phases import Phases
from ultramem_ds.testing.distributed import run_ranks
from ultramem_ds.testing.selections import SelectionLog
from ultramem_ds.train.engine import TrainEngine
from ultramem_ds.zero.deepspeed_import import deepspeed
from ultramem_ds.zero.runtime import Ranks

pytestmark = [pytest.mark.dist, pytest.mark.slow]

STEPS = 3
# fp32 sums in another order, amplified by Adam's first steps, where moments are small.
RTOL = 1e-5


@pytest.mark.parametrize("preset", PRESETS)
def test_full_width_and_depth_in_bf16(preset: str) -> None:
    """Losses of two ranks are those of one but for roundings; the plan knows about the memory.

    It lacks 0.2 to 0.6 GB, the same on one rank and on two, which is up to a fifth here
    (docs/measurements.md); two steps of a mixture on
    one rank stay a tenth below it.
    """
    args = SimpleNamespace(sequences=2, steps=2, set=[], timeout=3600)
    one, two = (measure(preset, ranks, args) for ranks in (1, 2))
    # bf16 keeps 8 bits, and a mean over 128 targets of logits that differ in the last of them
    # differs by less than a thousandth of the loss.
    assert two["losses"] == pytest.approx(one["losses"], rel=2e-3)
    for run in (one, two):
        assert 0.85 < run["peak"] / run["plan"] < 1.25


def selections_body(rank: int, world_size: int, config: Config, imposed: Any) -> Any:
    """(loss, grad norm) of each step, what this rank's samples selected, and its flips."""
    deepspeed.init_distributed("gloo", verbose=False)
    micro, total = config.train.micro_batch_size, config.train.global_batch_size
    batches = BatchPlan(total, micro, total // micro // world_size)
    ranks = Ranks(rank, world_size, rank, CPU)
    json = load_deepspeed_json(None, config.model.kind)
    engine = TrainEngine(config, ranks, json, batches, Phases())
    log = SelectionLog(engine.model, imposed)
    numbered = (
        replace(batch, sample_ids=(index * world_size + rank,))
        for index, batch in enumerate(random_batches(config, ranks, micro))
    )
    micro_batches = log.batches(numbered)
    results = [engine.train_step(micro_batches, step) for step in range(STEPS)]
    return [(r.loss, r.grad_norm) for r in results], log.slots, log.flips


def test_only_near_ties_part_one_rank_from_two() -> None:
    """ultramem-151m-x12's widths in two blocks, fp32: the promise of docs/measurements.md.

    With one rank's slots imposed the series agree to rounding: no error hides behind the choice of
    slots. Slots that two ranks choose otherwise were all but tied, and few.
    """
    sizes = ["model.num_layers=2", "memory.placement=1:2", "memory.knum=64"]
    sizes += ["model.vocab_size=512"]
    batch = ["train.global_batch_size=4", "train.micro_batch_size=1", "model.seq_len=64"]
    quiet = ["model.dropout=0", "train.precision=fp32", "optim.lr=1e-3"]
    config = load_config("ultramem-151m-x12", [*sizes, *batch, *quiet])
    expected, slots, _ = run_ranks(selections_body, 1, config, None, timeout_s=1800)[0]
    found = run_ranks(selections_body, 2, config, slots, timeout_s=1800)
    for series, _, flips in found:
        for mine, theirs in zip(series, expected):
            assert mine == pytest.approx(theirs, rel=RTOL)
        assert flips.searches == STEPS * 2 * 64 * 2  # sequences of this rank, tokens, heads
        assert len(flips.ties) <= 0.01 * flips.searches
        assert flips.widest < 1e-4
