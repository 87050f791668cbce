"""Optimizer state and masters on the CPU: the same series, and checkpoints that move both ways."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.dist.elastic_series import Leg, build_engine, micro_batches, run_legs
from ultramem_ds.config.deepspeed import CONFIG_DIR
from ultramem_ds.testing.distributed import run_ranks

CPU_OFFLOAD = CONFIG_DIR / "ultramem_zero3_cpu_offload.json"

# DeepSpeed's CPU Adam orders its fp32 operations otherwise than torch's: 1e-7 per step and weight.
TOLERANCE = dict(rtol=1e-5, atol=1e-6)


@pytest.mark.dist
def test_cpu_offload_gives_the_same_series(tmp_path: Path) -> None:
    """On 2 ranks; then loaded without offload, on one rank, and with it again."""
    plain = Leg(kind="ultramem", begin=0, end=6, run_dir=tmp_path / "plain", save=False)
    first = replace(plain, end=3, run_dir=tmp_path / "run", deepspeed_file=CPU_OFFLOAD, save=True)
    again = replace(first, begin=3, end=4)
    expected, offloaded, resumed = run_ranks(run_legs, 2, [plain, first, again])[0]
    without = replace(first, begin=4, end=5, deepspeed_file=None)
    back = replace(first, begin=5, end=6)
    one, two = run_ranks(run_legs, 1, [without, back])[0]
    torch.testing.assert_close(
        torch.tensor(offloaded + resumed + one + two), torch.tensor(expected), **TOLERANCE
    )


def said_body(rank: int, world_size: int, legs: list[Leg]) -> list[str]:
    """What the start of each leg says on stderr; a step is taken, too."""
    found = []
    for leg in legs:
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            engine = build_engine(leg, rank, world_size)
        engine.train_step(micro_batches(leg.config, engine.ranks, 0), 0)
        found.append(errors.getvalue())
        engine.engine.destroy()
    return found


@pytest.mark.dist
def test_what_is_not_moved_is_said_once(tmp_path: Path) -> None:
    """Of row-sparse tables; nothing where all is moved, or nothing is."""
    moved = Leg(kind="ultramem", begin=0, end=1, run_dir=tmp_path, deepspeed_file=CPU_OFFLOAD)
    kept = replace(moved, overrides=("memory.table_optimizer=row-sparse",))
    legs = [moved, kept, replace(kept, deepspeed_file=None)]
    main, other = run_ranks(said_body, 2, legs)
    line = "offload_optimizer moves the state of all but value tables to cpu"
    assert [said.count(line) for said in main] == [0, 1, 0]
    assert [said.count(line) for said in other] == [0, 0, 0]
