"""What is used of DeepSpeed's insides: the list is complete, checked, and backed by tests."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.dist.elastic_series import Leg, build_engine, micro_batches
from ultramem_ds.testing.distributed import run_ranks
from ultramem_ds.zero.deepspeed_import import deepspeed
from ultramem_ds.zero.pinned import PINNED, Pinned, check_names

TESTS = Path(__file__).parents[1]
ZERO = TESTS.parent / "ultramem_ds" / "zero"
# Private names of others than DeepSpeed.
OWN = {"_get_build_directory", "_exit"}  # of torch.utils.cpp_extension, of os


def private_names(source: str) -> set[str]:
    """Private or ``ds_`` attributes of anything but ``self``, and what is set on an engine."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Attribute):
            continue
        mine = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        private = node.attr.startswith("_") and not node.attr.startswith("__")
        if (private and not mine) or node.attr.startswith("ds_"):
            found.add(node.attr)
    return found - OWN


def test_every_private_name_is_listed() -> None:
    listed = {pinned.name for pinned in PINNED}
    for path in sorted(ZERO.glob("*.py")):
        unlisted = private_names(path.read_text()) - listed
        assert not unlisted, f"{path.name} uses {sorted(unlisted)}: add them to zero/pinned.py"
    used = "".join(path.read_text() for path in ZERO.glob("*.py") if path.name != "pinned.py")
    assert not [name for name in listed if name not in used], "listed, but nobody uses it"


def test_every_name_has_its_test() -> None:
    for pinned in PINNED:
        file, _, function = pinned.test.partition("::")
        assert f"def {function}(" in (TESTS / file).read_text(), pinned


def test_a_release_without_a_name_is_refused_in_one_line() -> None:
    gone = Pinned("runtime.engine", "_no_such_name", "nothing", "")
    with pytest.raises(
        ImportError, match=r"^DeepSpeed \S+ has no deepspeed.runtime.engine: _no_such"
    ):
        check_names([*PINNED, gone])


def norms(rank: int, world_size: int, legs: list[Leg]) -> list[Any]:
    """Body: global norm and its parts after a step, per leg."""
    found = []
    for leg in legs:
        engine = build_engine(leg, rank, world_size)
        result = engine.train_step(micro_batches(leg.config, engine.ranks, 0), 0)
        found.append((result.grad_norm, engine.telemetry.read(1.0)))
        engine.engine.destroy()
    return found


@pytest.mark.dist
def test_norms_of_tables_and_of_the_rest_make_the_whole(tmp_path: Path) -> None:
    legs = [
        Leg(kind="ultramem", begin=0, end=1, run_dir=tmp_path, overrides=(f"{key}={value}",))
        for key, value in (
            ("memory.table_optimizer", "dense"),
            ("memory.table_optimizer", "row-sparse"),
        )
    ]
    (dense_whole, dense), (rows_whole, rows) = run_ranks(norms, 2, legs)[0]
    for whole, parts in ((dense_whole, dense), (rows_whole, rows)):
        table, rest = parts["grad_norm_tables"], parts["grad_norm_dense"]
        assert table > 0 and rest > 0
        assert math.hypot(table, rest) == pytest.approx(whole, rel=1e-6)  # fp32 squares
    # Stepped by row, the tables' norm comes from elsewhere and is the same.
    assert rows["grad_norm_tables"] == pytest.approx(dense["grad_norm_tables"], rel=1e-5)


def test_no_marks_for_a_profiler() -> None:
    nvtx = deepspeed.utils.nvtx
    with mock.patch.object(nvtx, "_range_push") as push:
        assert nvtx.instrument_w_nvtx(lambda: 3)() == 3
        assert not push.called
        with mock.patch.object(nvtx, "enable_nvtx", True), mock.patch.object(nvtx, "_range_pop"):
            nvtx.instrument_w_nvtx(lambda: 3)()
        assert push.called  # the switch is still the switch
