"""Ranks that drift apart are noticed, and the odd one named, on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ultramem_ds.sharding.comm import Comm
from ultramem_ds.testing.distributed import run_ranks
from ultramem_ds.watch.desync import (
    ROTATION,
    DesyncError,
    DesyncGuard,
    checksum,
    code_digest,
    find_odd,
)

CPU = torch.device("cpu")


def outcome(guard: DesyncGuard, items: dict[str, int], **options: bool) -> str:
    try:
        guard.compare(items, **options)
    except DesyncError as error:
        return str(error)
    return ""


def body(rank: int, world_size: int) -> Any:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(8)))
    guard = DesyncGuard(Comm(), CPU, lambda: dict(model.named_parameters()), every=3)
    found = {"same": outcome(guard, {"step": 7}, everything=True)}
    found["step"] = outcome(guard, {"step": 7 + (rank == 1), "data": 5})
    if rank == 2:
        with torch.no_grad():  # one bit
            model[3].bias.view(torch.int32)[2] ^= 1
    found["parameter"] = outcome(guard, {"step": 8}, everything=True)
    found["turns"] = [bool(outcome(guard, {"step": 8})) for _ in range(ROTATION)]
    found["due"] = [step for step in range(10) if guard.due(step)]
    return found


def copies_body(rank: int, world_size: int) -> Any:
    """Two copies of a table in two blocks: ranks 0 and 2 hold one of them, 1 and 3 the other."""
    block_RV = torch.full((8, 4), float(rank % 2))
    guard = DesyncGuard(
        Comm(), CPU, dict, every=1, blocks=lambda: {"a": block_RV, "b": block_RV}, place=rank % 2
    )
    found = [outcome(guard, {"step": 1}, everything=True)]
    if rank == 3:
        block_RV.view(torch.int32)[5, 2] ^= 1
    return [*found, outcome(guard, {"step": 1}, everything=True)]


@pytest.mark.dist
def test_copies_of_a_table_are_compared_block_by_block() -> None:
    for same, flipped in run_ranks(copies_body, 4):
        assert same == ""
        expected = "ranks 1, 3 differ in the same block of value tables, without a majority (a, b)"
        assert flipped.endswith(expected)


@pytest.mark.dist
def test_three_ranks_name_the_odd_one() -> None:
    for found in run_ranks(body, 3):
        assert found["same"] == ""
        assert "rank 1 differs from 2 of 3 ranks in step" in found["step"]
        assert "data" not in found["step"]
        assert "rank 2 differs from 2 of 3 ranks in parameters (3.bias)" in found["parameter"]
        assert found["turns"].count(True) == 1  # every parameter has its turn, this one once
        assert found["due"] == [0, 3, 6, 9]


def test_majority_and_ties() -> None:
    names = ["step", "code"]
    assert find_odd([[1, 2]] * 4, names) == ""
    assert find_odd([[1, 2], [9, 2], [1, 2], [8, 2]], names).startswith("the 4 ranks differ in step")
    found = find_odd([[1, 2], [9, 3], [1, 2], [1, 2]], names)
    assert found == "rank 1 differs from 3 of 4 ranks in step, code"
    assert "ranks 1, 2 differ" in find_odd([[1, 2], [9, 2], [9, 2], [1, 2], [1, 2]], names)
    assert "without a majority" in find_odd([[1, 2], [1, 3]], names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_checksum_sees_every_bit_and_no_order(dtype: torch.dtype) -> None:
    x = torch.randn(3, 50, dtype=dtype)
    assert checksum(x) == checksum(x.flip(1).t().contiguous())
    y = x.clone()
    y.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[y.element_size()])[1, 7] ^= 1
    assert checksum(y) != checksum(x)
    assert checksum(torch.full((4,), torch.nan, dtype=dtype)) == checksum(
        torch.full((4,), torch.nan, dtype=dtype)
    )


def test_code_digest_is_of_the_sources() -> None:
    assert code_digest() == code_digest() and 0 <= code_digest() < 2**63
