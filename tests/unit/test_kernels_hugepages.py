"""Advice on memory pages: never changes contents, says whether it was taken."""

import ctypes
import mmap
import os
import subprocess
import sys
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
    zeros_RV = resident_zeros((1 << 16, 128), torch.float32, torch.device("cpu"))
    pages = zeros_RV.nbytes // mmap.PAGESIZE - 1  # the first may begin before the tensor
    first = -(-zeros_RV.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    resident = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.mincore(ctypes.c_void_p(first), ctypes.c_size_t(pages * mmap.PAGESIZE), resident)
    assert not failed, os.strerror(ctypes.get_errno())
    # The system may take a few back at any time.
    assert sum(page & 1 for page in resident) >= 0.9 * pages
    assert zeros_RV.shape == (1 << 16, 128) and not zeros_RV.any()


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists()
    or "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(),
    reason="no huge pages here",
)
@pytest.mark.parametrize("asked", [None, "0"])
def test_a_commands_tensors_take_huge_pages_unless_told_not_to(asked: str | None) -> None:
    script = """
from ultramem_ds.cli.main import main
main(["count", "--preset", "dense-debug"])
import torch
from ultramem_ds.kernels.hugepages import huge_page_bytes
print("bytes", huge_page_bytes(torch.zeros(1 << 24)))
"""
    environment = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    if asked is not None:
        environment["THP_MEM_ALLOC_ENABLE"] = asked
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert (int(done.stdout.split()[-1]) > 0) == (asked is None)
