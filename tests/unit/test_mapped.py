"""Copies out of mapped files: the same numbers, nothing of the file kept."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from ultramem_ds.utils.mapped import CHUNK_BYTES, copy_from_mapped


def resident_file_bytes() -> int:
    """Pages of files in this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile:"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_pages_are_let_go(tmp_path: Path) -> None:
    """A file of three chunks leaves less than one behind, and reads the same again."""
    stored_RC = torch.arange(3 * CHUNK_BYTES // 4, dtype=torch.float32).view(-1, 64)
    torch.save({"x": stored_RC}, tmp_path / "x.pt")
    mapped_RC = torch.load(tmp_path / "x.pt", mmap=True)["x"]
    before = resident_file_bytes()
    for _ in range(2):
        out_RC = torch.empty_like(stored_RC)
        copy_from_mapped(out_RC, mapped_RC)
        assert torch.equal(out_RC, stored_RC)
        assert resident_file_bytes() - before < CHUNK_BYTES


def test_columns_of_a_mapped_matrix(tmp_path: Path) -> None:
    """Any block of rows and columns, into a part of a larger buffer and another dtype."""
    stored_RC = torch.randn(1000, 48)
    torch.save({"x": stored_RC}, tmp_path / "x.pt")
    mapped_RC = torch.load(tmp_path / "x.pt", mmap=True)["x"]
    out_RC = torch.zeros(400, 32, dtype=torch.float64)
    copy_from_mapped(out_RC[:300, 8:24], mapped_RC[500:800, 16:32])
    assert torch.equal(out_RC[:300, 8:24], stored_RC[500:800, 16:32].double())
    assert not out_RC[300:].any()
