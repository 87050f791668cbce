"""Loading at another world size holds the new shard and a bounded block of files, no more."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import pytest

from tests.dist.elastic_series import Leg, build_engine, run_leg
from ultramem_ds.testing.distributed import run_ranks
from ultramem_ds.checkpoint import directory as checkpoints
from ultramem_ds.utils.mapped import CHUNK_BYTES

KNUM, VALUE_DIM = 840, 64
TABLE_BYTES = KNUM**2 * VALUE_DIM * 4  # 181 MB
SLACK_BYTES = 24 << 20  # the interpreter, the other parameters (1 MB), pages at the edges

BIG = (
    f"memory.knum={KNUM}",
    f"memory.value_dim={VALUE_DIM}",
    "memory.partition=number-wise",
    "memory.placement=1:2",
)


MCL_CURRENT = 1


def status_bytes(key: str) -> int:
    """A line of this process's status: VmRSS now, VmHWM the most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(key)


def save(rank: int, world_size: int, leg: Leg) -> None:
    """A checkpoint after one step."""
    run_leg(leg, rank, world_size)


def growth_while_loading(rank: int, world_size: int, leg: Leg) -> tuple[int, int]:
    """Most memory above that before loading, and what is left of it after."""
    engine = build_engine(leg, rank, world_size)
    latest = checkpoints.latest_checkpoint(leg.run_dir)
    assert latest is not None
    # What the system has taken back of what was built would return while loading.
    ctypes.CDLL(None).mlockall(MCL_CURRENT)
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    engine.load(latest)
    return status_bytes("VmHWM") - before, status_bytes("VmRSS") - before


@pytest.mark.dist
@pytest.mark.parametrize("optimizer", ["dense", "row-sparse"])
def test_loading_holds_the_shard_and_a_block(tmp_path: Path, optimizer: str) -> None:
    """2 ranks -> 4 and 1, by columns too: the moments, which are new, and one block."""
    leg = Leg(
        kind="ultramem",
        begin=0,
        end=1,
        run_dir=tmp_path,
        overrides=(*BIG, f"memory.table_optimizer={optimizer}"),
    )
    run_ranks(save, 2, leg)
    columns = replace(leg, overrides=(*leg.overrides, "memory.partition=dimension-wise"))
    for world_size, target in ((1, leg), (4, leg), (2, columns)):
        shard = TABLE_BYTES // world_size
        moments = 2 * shard if optimizer == "dense" else 0  # row-sparse made them when building
        for peak, after in run_ranks(growth_while_loading, world_size, target):
            # Some pages of what was built may have gone back to the system meanwhile.
            assert after >= moments - SLACK_BYTES, "the test measures nothing"
            assert peak <= moments + CHUNK_BYTES + SLACK_BYTES, (world_size, optimizer)
