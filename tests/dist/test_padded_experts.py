"""Experts that do not divide over the ranks: padded, with the results of the unpadded model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.elastic_series import Leg, build_engine, run_leg, run_legs
from ultramem_ds.checkpoint.directory import latest_checkpoint
from ultramem_ds.checkpoint.parameters import parameter_records
from ultramem_ds.checkpoint.reader import CheckpointReader
from ultramem_ds.planning.experts import ExpertLayout
from ultramem_ds.testing.distributed import run_ranks
from ultramem_ds.zero import experts
from ultramem_ds.zero.experts import is_padding

pytestmark = pytest.mark.dist


class Roomy(ExpertLayout):
    """One slot more per rank than experts need."""

    @property
    def slots_per_rank(self) -> int:
        return super().slots_per_rank + 1


def leg(run_dir: Path, num_experts: int, *overrides: str, **options: Any) -> Leg:
    sizes = (f"moe.num_experts={num_experts}", "train.micro_batch_size=1", *overrides)
    return Leg(kind="moe", run_dir=run_dir, overrides=sizes, **{"begin": 0, "end": 4, **options})


def forced_body(rank: int, world_size: int, run: Leg) -> Any:
    """The series with the layout as it is, and with padding that nobody needs."""
    plain = run_leg(run, rank, world_size)
    group = world_size
    experts.expert_layout = lambda config, ranks: Roomy(config.moe.num_experts, group)
    padded = run_leg(run, rank, world_size)
    engine = build_engine(run, rank, world_size)
    padding = sum(p.numel() for p in engine.model.parameters() if is_padding(p))
    return plain, padded, padding


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    "gate",
    [
        ("moe.top_k=2",),
        ("moe.top_k=1", "moe.drop_tokens=true", "moe.capacity_factor=1.5"),
    ],
)
def test_padding_changes_no_digit_of_the_loss(
    world_size: int, gate: tuple[str, ...], tmp_path: Path
) -> None:
    """4 experts in 4 and in 8 or 6 slots, without clipping, whose norm adds in another order."""
    run = leg(tmp_path, 4, *gate, "optim.clip_grad=0", save=False)
    for plain, padded, padding in run_ranks(forced_body, world_size, run):
        assert [loss for loss, _ in padded] == [loss for loss, _ in plain]
        assert [norm for _, norm in padded] == pytest.approx([n for _, n in plain], rel=1e-6)
        slots = Roomy(4, world_size).num_slots - 4
        assert padding in (0, slots * 2 * 32 * 64 * 2)  # on the last rank: all, on others: none


def test_three_experts_on_two_ranks_are_saved_without_padding(tmp_path: Path) -> None:
    """The series of one rank, to the last digit after resuming, and nothing of a fourth expert."""
    alone = run_ranks(run_legs, 1, [leg(tmp_path, 3, save=False)])[0][0]
    whole = leg(tmp_path, 3, save=False)
    first = leg(tmp_path, 3, end=2)
    two, before, after = run_ranks(
        run_legs, 2, [whole, first, replace(first, begin=2, end=4, save=False)]
    )[0]
    assert before + after == two
    torch.testing.assert_close(torch.tensor(two), torch.tensor(alone), rtol=1e-5, atol=1e-6)
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    names = {piece.name for s in CheckpointReader(checkpoint).stores for piece in s["zero"].pieces}
    assert names == parameter_records(first.config).keys()
    assert any(".experts.2." in name for name in names)
    files = [path.name for path in checkpoint.iterdir() if "_expert_" in path.name]
    assert len(files) == 2 * 3 and not any("_expert_3_" in name for name in files)


@pytest.mark.slow
def test_the_papers_expert_counts_start_on_4_and_8_ranks(tmp_path: Path) -> None:
    """33 experts from 4 ranks (9 slots each) to 8 (5 each), and 34 on both: as on one rank."""
    odd, even = leg(tmp_path / "33", 33, save=False), leg(tmp_path / "34", 34, save=False)
    expected = [torch.tensor(s) for s in run_ranks(run_legs, 1, [odd, even])[0]]
    begin = replace(odd, end=2, save=True)
    on_four = run_ranks(run_legs, 4, [begin, even], timeout_s=600)[0]
    on_eight = run_ranks(run_legs, 8, [replace(odd, begin=2), even], timeout_s=600)[0]
    for found, series in (
        (on_four[0] + on_eight[0], expected[0]),
        (on_four[1], expected[1]),
        (on_eight[1], expected[1]),
    ):
        torch.testing.assert_close(torch.tensor(found), series, rtol=1e-5, atol=1e-6)
