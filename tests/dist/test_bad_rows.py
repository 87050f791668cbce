"""A row id outside the table, looked up in one sub-group: every rank of every group stops."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.dist.test_failing_ranks import finish, start
from ultramem_ds.testing.launched import faults_of

MEMORY = ("memory.placement=1:2", "memory.knum=25", "memory.top_m=4", "memory.shard_group_size=2")


@pytest.mark.dist
def test_bad_row_in_one_group_stops_all(prepared: Path, tmp_path: Path) -> None:
    """Rank 3 asks; ranks 2 and 3 refuse together, 0 and 1 hear of it while they wait."""
    job = start(
        prepared,
        tmp_path / "run",
        *MEMORY,
        faults="badrow@2:3",
        preset="ultramem-debug",
        nproc=4,
    )
    began = time.monotonic()
    code, output = finish(job)
    assert code != 0
    assert "row ids outside 0..624 were looked up (rank 3: 1 ids)" in output
    (fault,) = faults_of(tmp_path / "run")
    assert fault["rank"] in (2, 3) and fault["step"] == 2 and "rank 3: 1 ids" in str(fault)
    # Start-up included; the collective that ranks 0 and 1 wait in would time out after 30 minutes.
    assert time.monotonic() - began < 90
