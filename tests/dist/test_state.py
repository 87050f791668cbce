"""What survives a restart, and what no rank ever holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import VOCAB_SIZE
from tests.dist.launching import run_module

pytestmark = pytest.mark.dist

SMALL = (
    "model.hidden_size=32 model.inner_size=64 model.seq_len=64 train.global_batch_size=8 "
    f"model.vocab_size={VOCAB_SIZE} train.micro_batch_size=2 train.max_steps=10"
).split()


def check(name: str, job: dict[str, Any], tmp_path: Path, nproc: int) -> dict[str, Any]:
    job = {**job, "out": str(tmp_path / "out.json"), "scratch": str(tmp_path / "scratch")}
    (tmp_path / "job.json").write_text(json.dumps(job))
    run_module("tests.dist.state_worker", name, str(tmp_path / "job.json"), nproc=nproc)
    found: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
    return found


def test_resume_continues_to_the_last_digit(prepared: Path, tmp_path: Path) -> None:
    """With dropout: random-number states are part of a checkpoint."""
    small = [*SMALL, "model.dropout=0.1"]
    kinds = {
        "dense": small,
        "pkm": [*small, "memory.knum=25", "memory.value_dim=32", "memory.top_m=4"],
        "moe": [*small, "moe.num_experts=4"],
        "ultramem": [*small, "memory.knum=25", "memory.value_dim=16", "memory.top_m=4"],
    }
    found = check("resumed", {"kinds": kinds, "data": str(prepared)}, tmp_path, nproc=2)
    for kind, (undisturbed, continued) in found.items():
        assert continued == undisturbed, kind  # exactly: the same arithmetic in the same order


def test_no_rank_allocates_a_whole_table(prepared: Path, tmp_path: Path) -> None:
    """One table that dominates: 512^2 rows of 64 fp32 columns, 67 MB."""
    overrides = [*SMALL, "memory.placement=2:3", "memory.knum=512", "train.micro_batch_size=1"]
    overrides += ["memory.wire_gb_per_s=1", "memory.memory_gb_per_s=10"]  # measuring reads 128 MiB
    job = {"overrides": overrides, "data": str(prepared)}
    world_size = 4
    found = check("largest_allocation", job, tmp_path, nproc=world_size)
    table_elements = 512**2 * 64
    # ZeRO flattens a rank's shard with its share of the other parameters (2 % here).
    assert found["largest_elements"] < table_elements / world_size * 1.1
    assert found["largest_elements"] >= table_elements / world_size  # the shard itself was seen
