"""Large memory pages for tables: a random row then rarely misses the address cache (TLB).

With 4 KiB pages a 2.5 GB table has 600,000 of them and every looked-up row costs a page walk;
with 2 MiB pages it has 1200.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

_MADV_HUGEPAGE = 14  # linux/mman.h: huge pages at the next first touch
_MADV_COLLAPSE = 25  # linux/mman.h: rewrite touched pages as huge ones now (Linux 6.1)
HUGE_PAGE_BYTES = 2 << 20


def advise_huge_pages(tensor: Tensor, *, collapse: bool = False) -> bool:
    """Ask the kernel to back a CPU tensor's memory with huge pages.

    Call it between allocating and filling a table. On a table already filled only ``collapse``
    has an effect at once (it copies, about a second per few GB). Advice only: contents never
    change, and a system without huge pages goes on as before.

    Args:
        tensor: a contiguous CPU tensor; the whole huge pages inside it are advised.
        collapse: also convert pages that have been touched.

    Returns:
        Whether the kernel took the advice (False for small tensors, other devices and systems).

    Raises:
        ValueError: the tensor is not contiguous.
    """
    if not tensor.is_contiguous():
        raise ValueError("advise_huge_pages wants a contiguous tensor")
    if tensor.device.type != "cpu" or not sys.platform.startswith("linux"):
        return False
    start = -(-tensor.data_ptr() // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    length = (tensor.data_ptr() + tensor.nbytes - start) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if length <= 0:
        return False
    assert start % mmap.PAGESIZE == 0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    taken = libc.madvise(start, length, _MADV_HUGEPAGE) == 0
    return taken and (not collapse or libc.madvise(start, length, _MADV_COLLAPSE) == 0)


def resident_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros whose memory is there at once, in huge pages where the system has them.

    ``torch.zeros`` of a large CPU tensor leaves its pages to their first touch: a row-sparse step
    would pay two page faults for every row that it meets for the first time, the more the larger
    the table.
    """
    tensor = torch.empty(tuple(shape), dtype=dtype, device=device)
    advise_huge_pages(tensor)
    return tensor.zero_()


def huge_page_bytes(tensor: Tensor) -> int:
    """Return how many bytes of the mappings around a CPU tensor lie in huge pages (Linux).

    Reads ``/proc/self/smaps``; mappings may be shared with neighbouring tensors, so that the
    result can exceed the tensor's size.
    """
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    total, inside = 0, False
    if not os.path.exists("/proc/self/smaps"):
        return 0
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            first = line.split(maxsplit=1)[0]
            if "-" in first and not first.endswith(":"):
                low, high = (int(bound, 16) for bound in first.split("-"))
                inside = low < end and begin < high
            elif inside and first == "AnonHugePages:":
                total += int(line.split()[1]) * 1024
    return total
