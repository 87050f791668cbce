"""Advice on memory pages: never changes contents, says whether it was taken."""

import pytest
import torch

from ultramem_ds.kernels.hugepages import HUGE_PAGE_BYTES, advise_huge_pages, huge_page_bytes


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
