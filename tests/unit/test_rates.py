"""The rates that decide ``memory.partition=auto``: where they are from, and that ranks agree."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ultramem_ds.config.load import load_config
from ultramem_ds.config.schema import MemoryConfig
from ultramem_ds.planning import rates
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
    rates.MOST_SPREAD = math.inf  # kept, however busy this machine is
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
        other = rates.Measured(1e-9, 1e9, 1.0, time.time())
        stored.write_text(json.dumps({kind: asdict(other)}))
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


class OneRank:
    """A group of one rank."""

    rank, world_size = 0, 1

    def from_first(self, value: Any) -> Any:
        return value


KIND = "some machine"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(rates, "machine_kind", lambda *_: KIND)
    return tmp_path / "ultramem_ds" / "rates.json"


def start(monkeypatch: pytest.MonkeyPatch, *repetitions: tuple[float, float]) -> rates.Rates:
    """The rates of one start, where measuring would give these (wire, memory), one by one."""
    left: Iterator[tuple[float, float]] = iter(repetitions)
    monkeypatch.setattr(rates, "measure_once", lambda *_: next(left))
    comm: Any = OneRank()
    found = run_rates(MemoryConfig(), comm, comm, CPU, 4)
    assert not list(left)  # all of them were asked for
    return found


def test_repetitions_that_agree_are_kept_and_the_best_counts(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start(monkeypatch, (2.0, 8.0), (2.4, 10.0), (2.2, 9.0))
    assert (first.wire_gb_per_s, first.memory_gb_per_s) == (2.4, 10.0)
    assert first.source == f"measured now, kept in {file}"
    entry = json.loads(file.read_text())[KIND]
    assert entry["spread"] == 1.25 and abs(time.time() - entry["measured_s"]) < 60
    again = start(monkeypatch)
    assert (again.wire_gb_per_s, again.memory_gb_per_s) == (2.4, 10.0)
    assert "earlier start" in again.source


def test_repetitions_that_disagree_are_used_once_and_not_kept(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rate that jumps is enough."""
    noisy = start(monkeypatch, (2.0, 8.0), (2.0, 2.0), (2.0, 6.0))
    assert (noisy.wire_gb_per_s, noisy.memory_gb_per_s) == (2.0, 8.0)
    assert "not kept: 3 repetitions differ by a factor of 4.0" in str(noisy)
    assert not file.exists()
    quiet = start(monkeypatch, *[(2.0, 9.0)] * 3)
    assert quiet.memory_gb_per_s == 9.0 and file.exists()


def test_what_was_kept_is_measured_anew_after_a_while(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(monkeypatch, *[(1.0, 1.0)] * 3)  # busy, evenly: nothing gives it away
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 6 * 86400)
    assert start(monkeypatch).wire_gb_per_s == 1.0
    monkeypatch.setattr(time, "time", lambda: now + 8 * 86400)
    assert start(monkeypatch, *[(3.0, 3.0)] * 3).wire_gb_per_s == 3.0


@pytest.mark.parametrize(
    "entry", [[2.0, 8.0], {"wire_gb_per_s": 1.0}, "x", None, dict.fromkeys(("a", "b"), 1)]
)
def test_an_entry_of_another_form_is_measured_anew(
    file: Path, monkeypatch: pytest.MonkeyPatch, entry: Any
) -> None:
    """As versions before wrote it, or by hand."""
    file.parent.mkdir()
    file.write_text(json.dumps({KIND: entry, "another": [1.0, 1.0]}))
    assert "measured now" in start(monkeypatch, *[(2.0, 8.0)] * 3).source
    assert json.loads(file.read_text())["another"] == [1.0, 1.0]


@pytest.mark.parametrize("wire", [0, -1.0, float("inf"), "1"])
def test_an_entry_that_is_no_rate_is_measured_anew(
    file: Path, monkeypatch: pytest.MonkeyPatch, wire: Any
) -> None:
    entry = {"wire_gb_per_s": wire, "memory_gb_per_s": 1.0, "spread": 1.0, "measured_s": 1e12}
    file.parent.mkdir()
    file.write_text(json.dumps({KIND: entry}))
    assert start(monkeypatch, *[(2.0, 8.0)] * 3).wire_gb_per_s == 2.0
