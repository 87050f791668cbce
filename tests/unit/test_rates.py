"""The rates that decide ``memory.partition=auto``: where they are from, and that ranks agree."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ultramem_ds.config.load import load_config
from ultramem_ds.config.schema import MemoryConfig
from ultramem_ds.planning.memory import value_bytes
from ultramem_ds.planning.partition import decide_partition
from ultramem_ds.planning.rates import ASSUMED, machine_kind, planned_rates, run_rates
from ultramem_ds.sharding.comm import Comm
from ultramem_ds.sharding.groups import make_groups
from ultramem_ds.testing.distributed import run_ranks

CPU = torch.device("cpu")


def test_a_plan_takes_numbers_then_the_file_then_assumes(tmp_path: Path) -> None:
    assert planned_rates(MemoryConfig()) == ASSUMED
    both = planned_rates(MemoryConfig(wire_gb_per_s=25, memory_gb_per_s=2000))
    assert (both.wire_gb_per_s, both.memory_gb_per_s, both.source) == (25, 2000, "configured")
    file = tmp_path / "comm.json"  # as `bench comm --json` prints it
    file.write_text(json.dumps({"rows": [], "rates": {"wire_gb_per_s": 3, "memory_gb_per_s": 40}}))
    found = planned_rates(MemoryConfig(rates_file=str(file)))
    assert (found.wire_gb_per_s, found.memory_gb_per_s) == (3, 40) and str(file) in found.source
    mixed = planned_rates(MemoryConfig(rates_file=str(file), memory_gb_per_s=7.0))
    assert (mixed.wire_gb_per_s, mixed.memory_gb_per_s) == (3, 7)
    assert "one configured" in mixed.source and str(file) in mixed.source


@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"rates": {}}', '{"rates": {"wire_gb_per_s": "x"}}']
)
def test_a_file_without_rates_is_refused(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "comm.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=r"memory\.rates_file=.*bench comm --json"):
        planned_rates(MemoryConfig(rates_file=str(file)))


@pytest.mark.parametrize("rate", [0, -1.0])
def test_rates_are_positive_or_auto(rate: float) -> None:
    for name in ("wire_gb_per_s", "memory_gb_per_s"):
        with pytest.raises(ValueError, match=f"memory.{name}"):
            MemoryConfig(**{name: rate})


def rates_body(rank: int, world_size: int, cache: Path) -> dict[str, Any]:
    """Two starts whose ranks see caches of their own, and the choice at two extremes of rates."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(cache / str(rank))
    world, groups = Comm(), make_groups()
    config = load_config("ultramem-debug")
    memory = config.memory
    drawn = torch.get_rng_state()
    first = run_rates(memory, world, groups.shard, CPU, 4)
    same_draws = torch.equal(drawn, torch.get_rng_state())
    stored = cache / str(rank) / "ultramem_ds" / "rates.json"
    if rank == 1:  # what this rank finds is not what rank 0 finds
        kind = machine_kind(CPU, world_size, world_size, memory.value_dim * 4)
        stored.parent.mkdir(parents=True, exist_ok=True)
        stored.write_text(json.dumps({kind: [1e-9, 1e9]}))
    second = run_rates(memory, world, groups.shard, CPU, value_bytes(config))
    chosen = []
    for wire, rows in ((0.001, 1000.0), (1000.0, 0.001)):
        extreme = replace(memory, wire_gb_per_s=wire, memory_gb_per_s=rows, value_dim=16)
        chosen.append(decide_partition(replace(config, memory=extreme), world, groups, CPU))
    return {
        "first": first,
        "second": second,
        "chosen": chosen,
        "stored": stored.exists(),
        "same": same_draws,
    }


@pytest.mark.dist
def test_ranks_measure_once_and_rank_0_decides(tmp_path: Path) -> None:
    zero, one = run_ranks(rates_body, 2, tmp_path)
    for start in ("first", "second"):  # the files' names differ
        mine, theirs = zero[start], one[start]
        assert (mine.wire_gb_per_s, mine.memory_gb_per_s) == (
            theirs.wire_gb_per_s,
            theirs.memory_gb_per_s,
        )
    assert "measured now" in zero["first"].source and zero["stored"]
    assert zero["same"] and one["same"]  # else dropout would depend on which start measured
    assert "earlier start" in zero["second"].source
    assert zero["second"].wire_gb_per_s == zero["first"].wire_gb_per_s
    assert 0.001 < zero["first"].wire_gb_per_s < 1000 and zero["first"].memory_gb_per_s > 0.01
    assert zero["chosen"] == one["chosen"]
    slow_wire, slow_memory = zero["chosen"]
    assert slow_wire == "dimension-wise" != slow_memory  # which reads twice as many cache lines
