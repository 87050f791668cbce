"""Row gradients added up in bounded memory, against a dense buffer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ultramem_ds.sharding.row_sum import RowSum

NUM_ROWS, WIDTH = 40, 3
CPU = torch.device("cpu")


def additions(count: int, rows_each: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randperm(NUM_ROWS, generator=generator)[:rows_each].sort().values,
            torch.randn(rows_each, WIDTH, generator=generator),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize(("count", "rows_each"), [(1, 7), (2, 5), (9, 6), (4, 40), (3, 0)])
def test_sums_are_those_of_a_dense_buffer(count: int, rows_each: int) -> None:
    """Twice, since taking begins anew; the order of additions is the same, hence the bits."""
    row_sum = RowSum(NUM_ROWS, WIDTH, CPU)
    for seed in range(2):
        dense_RV = torch.zeros(NUM_ROWS, WIDTH)
        touched: set[int] = set()
        for rows_U, grad_UV in additions(count, rows_each, seed):
            dense_RV.index_add_(0, rows_U, grad_UV)
            touched |= set(rows_U.tolist())
            row_sum.add(rows_U, grad_UV.clone())
        rows_U, sums_UV = row_sum.take()
        assert rows_U.dtype == torch.int64 and rows_U.tolist() == sorted(touched)
        assert torch.equal(sums_UV, dense_RV[rows_U])
        assert sums_UV.is_contiguous()


def test_memory_is_bounded_by_the_shard() -> None:
    """However many micro-batches: at most a gradient and a slot number per row of the shard."""
    row_sum = RowSum(NUM_ROWS, WIDTH, CPU)
    held = []
    for rows_U, grad_UV in additions(100, 30, 0):
        row_sum.add(rows_U, grad_UV)
        held.append(row_sum.num_bytes)
    assert max(held) == held[-1] == NUM_ROWS * (4 * WIDTH + 4)
    rows_U, _ = row_sum.take()
    assert rows_U.numel() == NUM_ROWS and row_sum.num_bytes == 0
