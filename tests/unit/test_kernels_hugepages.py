"""Advice on memory pages: never changes contents, says whether it was taken."""

from pathlib import Path

import pytest
import torch

from ultramem_ds.kernels.hugepages import (
    HUGE_PAGE_BYTES,
    advise_huge_pages,
    huge_page_bytes,
    resident_zeros,
)


def test_contents_survive_and_small_tensors_are_left_alone():
    small = torch.ones(8)
    assert advise_huge_pages(small) is False
    table_RV = torch.arange(4 * HUGE_PAGE_BYTES // 4, dtype=torch.int32).view(-1, 64)
    expected = table_RV.clone()
    advise_huge_pages(table_RV, collapse=True)
    assert torch.equal(table_RV, expected)
    assert huge_page_bytes(table_RV) % 1024 == 0


def test_non_contiguous_tensor_is_refused():
    with pytest.raises(ValueError, match="contiguous"):
        advise_huge_pages(torch.ones(4, 4).t())


def test_resident_zeros_are_in_memory_at_once() -> None:
    """Unlike ``torch.zeros``, whose pages come with their first touch."""

    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))

    before = resident()
    zeros_RV = resident_zeros((1 << 16, 128), torch.float32, torch.device("cpu"))
    assert resident() - before >= 0.9 * zeros_RV.nbytes
    assert zeros_RV.shape == (1 << 16, 128) and not zeros_RV.any()
