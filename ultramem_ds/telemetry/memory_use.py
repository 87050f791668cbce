"""Memory of this process, now and at its peak."""

from __future__ import annotations

import resource
import sys

import psutil
import torch


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory this process has held, bytes: GPU allocations, or resident memory on CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_bytes(device: torch.device) -> int:
    """Memory this process holds now, bytes: GPU allocations, or resident memory on CPU."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return int(psutil.Process().memory_info().rss)
