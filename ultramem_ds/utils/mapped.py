"""Copy out of files that are mapped into memory, without keeping what has been read."""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

MADV_DONTNEED = 4
CHUNK_BYTES = 32 << 20  # read of a mapped file at a time


def copy_from_mapped(out_RC: Tensor, mapped_RC: Tensor) -> None:
    """``out_RC.copy_(mapped_RC)``, at most ``CHUNK_BYTES`` of the file in this process's memory.

    Args:
        out_RC: (R, C).
        mapped_RC: (R, C) rows of a mapped file, which nobody has written to.
    """
    row_bytes = mapped_RC.stride(0) * mapped_RC.element_size()
    step = max(1, CHUNK_BYTES // max(1, row_bytes))
    for out, chunk in zip(out_RC.split(step), mapped_RC.split(step)):
        out.copy_(chunk)
        _forget(chunk.data_ptr(), (chunk.shape[0] - 1) * row_bytes)


def _forget(address: int, num_bytes: int) -> None:
    """Let go of the whole pages inside; the next look reads them from the file again."""
    if not sys.platform.startswith("linux"):
        return
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (address + num_bytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if length > 0:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        libc.madvise(first, length, MADV_DONTNEED)
