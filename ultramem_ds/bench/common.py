"""What every benchmark shares: its header, alternating timing, its JSON and its table."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from ultramem_ds import __version__

PACKAGES = ("torch", "deepspeed", "triton", "numpy")


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call over the rounds of a run.

    Attributes:
        median_ms: median over rounds.
        low_ms: first quartile.
        high_ms: third quartile.
        rounds: number of rounds.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    rounds: int

    @classmethod
    def of(cls, samples_ms: Sequence[float]) -> Timing:
        """Summarise samples, one per round."""
        low, _, high = statistics.quantiles(samples_ms, n=4, method="inclusive")
        return cls(statistics.median(samples_ms), low, high, len(samples_ms))

    def as_row(self) -> dict[str, float | int]:
        """Return the fields a row of a benchmark's JSON carries."""
        return {
            "time_ms": self.median_ms,
            "low_ms": self.low_ms,
            "high_ms": self.high_ms,
            "rounds": self.rounds,
        }


def time_alternating(
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    sample_s: float = 0.05,
    synchronize: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time variants against each other: every round runs each of them, starting one further on.

    Drift of the machine (clock, neighbours) then falls on all alike. A sample repeats its call
    until about ``sample_s`` have passed, with the number of repeats set by the warm-up.

    Args:
        variants: name -> a call to be timed. Its first calls are a warm-up.
        rounds: samples per variant, at least 2.
        sample_s: length of a sample in seconds.
        synchronize: waits for the device; called before and after a sample.

    Raises:
        ValueError: fewer than 2 rounds.
    """
    if rounds < 2:
        raise ValueError(f"rounds={rounds}: at least 2 are needed for a spread")
    repeats = {name: _repeats(run, sample_s, synchronize) for name, run in variants.items()}
    samples_ms: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for round_index in range(rounds):
        shift = round_index % len(names)
        for name in names[shift:] + names[:shift]:
            elapsed_s = _elapsed_s(variants[name], repeats[name], synchronize)
            samples_ms[name].append(elapsed_s / repeats[name] * 1e3)
    return {name: Timing.of(samples) for name, samples in samples_ms.items()}


def _elapsed_s(run: Callable[[], object], repeats: int, synchronize: Callable[[], None]) -> float:
    synchronize()
    start_s = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize()
    return time.perf_counter() - start_s


def _repeats(run: Callable[[], object], sample_s: float, synchronize: Callable[[], None]) -> int:
    _elapsed_s(run, 1, synchronize)  # builds, caches, first touches
    once_s = _elapsed_s(run, 1, synchronize)
    if once_s * 20 < sample_s:
        once_s = _elapsed_s(run, 10, synchronize) / 10
    return max(1, round(sample_s / max(once_s, 1e-9)))


def keep_freed_memory() -> bool:
    """Let freed memory stay with this process (glibc), so that fresh buffers fault no pages.

    Large temporaries otherwise return to the kernel when freed, and their next use pays a fault per
    page. Returns whether the C library has the switch. It cannot be taken back.
    """
    mmap_max, trim_threshold, top_pad = -4, -1, -2  # of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    settings = ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 1 << 28))
    return all(mallopt(name, value) == 1 for name, value in settings)


def header(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``{hardware, versions, config, commit}``, what every benchmark's JSON begins with."""
    return {
        "hardware": hardware(),
        "versions": versions(),
        "config": dict(config),
        "commit": commit(),
    }


def hardware() -> dict[str, Any]:
    """Return CPU model, cores, threads used, memory, and the GPU if there is one."""
    return {
        "cpu": _cpu_model(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": os.getloadavg()[0],
    }


def versions() -> dict[str, str | None]:
    """Return the versions of Python, this package and those that do the work."""
    found: dict[str, str | None] = {"python": platform.python_version(), "ultramem_ds": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str | None:
    """Return the git commit of this package's files, ``-dirty`` if they differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def print_document(document: Mapping[str, Any], *, as_json: bool, columns: Sequence[str]) -> None:
    """Print a benchmark's document: one JSON value, or its rows as a table under its header."""
    if as_json:
        print(json.dumps(document))
        return
    rows = [[_cell(row.get(column)) for column in columns] for row in document["rows"]]
    widths = [max(map(len, cells)) for cells in zip(columns, *rows)]
    for cells in [list(columns), *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip())
    for key in ("hardware", "versions", "config", "commit"):
        print(f"{key}: {document[key]}")


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
