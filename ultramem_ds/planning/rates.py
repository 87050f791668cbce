"""How fast a rank sends and how fast it reads rows: what decides ``memory.partition=auto``.

In this order: the numbers in the configuration, the file that ``bench comm --json`` wrote, what an
earlier start measured on this kind of machine, a measurement now (:func:`measure_rates`, about a
second). A plan for other machines, with no process group to measure, assumes gloo's on CPUs.

A machine that is busy while it is measured must not decide for later starts: repetitions that
disagree are used by this run and not kept, and what was kept is measured anew after a while.

Letters: P ranks, R rows, V value width.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ultramem_ds.config.schema import MemoryConfig
from ultramem_ds.kernels.build import cache_dir
from ultramem_ds.sharding.comm import Comm
from ultramem_ds.utils.files import read_json, write_json

WIRE_BYTES = 4 << 20  # payload of one exchange: latency is under a hundredth of it
MEMORY_BYTES = 128 << 20  # of the rows read at random: more than a cache holds
REPETITIONS = 3
ROUNDS = 8  # of each, the best counts
MOST_SPREAD = 3.0  # best over worst repetition, to be kept; about 2 where nothing else runs
MOST_AGE_S = 7 * 86400.0


@dataclass(frozen=True)
class Rates:
    """Both rates, and where they are from.

    Attributes:
        wire_gb_per_s: GB/s that a rank sends in an all-to-all.
        memory_gb_per_s: GB/s of table rows that a rank reads at random.
        source: in words.
    """

    wire_gb_per_s: float
    memory_gb_per_s: float
    source: str

    def __str__(self) -> str:
        return (
            f"{self.wire_gb_per_s:.4g} GB/s sent per rank, {self.memory_gb_per_s:.4g} GB/s of rows "
            f"read ({self.source})"
        )


@dataclass(frozen=True)
class Measured:
    """What was measured: an entry of ``rates.json``.

    Attributes:
        wire_gb_per_s: the best repetition's.
        memory_gb_per_s: the best repetition's.
        spread: best over worst repetition, of the rate where they differ more.
        measured_s: when, Unix time.

    Raises:
        ValueError: not numbers that can have been measured.
    """

    wire_gb_per_s: float
    memory_gb_per_s: float
    spread: float
    measured_s: float

    def __post_init__(self) -> None:
        if not all(0 < number < math.inf for number in asdict(self).values()):
            raise ValueError(f"not measured: {self}")

    @property
    def age_s(self) -> float:
        """Seconds since then."""
        return time.time() - self.measured_s


ASSUMED = Rates(1.0, 10.0, "assumed: gloo on CPUs; `bench comm` measures")


def planned_rates(memory: MemoryConfig) -> Rates:
    """The rates of a plan: as configured, else from ``memory.rates_file``, else assumed.

    Raises:
        ValueError: the file cannot be read or holds no rates.
    """
    return _configured(memory, ASSUMED if not memory.rates_file else _from_file(memory.rates_file))


def need_measuring(memory: MemoryConfig) -> bool:
    """Whether neither numbers nor a file tell both rates."""
    asked = (memory.wire_gb_per_s, memory.memory_gb_per_s)
    return not memory.rates_file and "auto" in asked


def _configured(memory: MemoryConfig, found: Rates) -> Rates:
    """``found``, with what the configuration says instead."""
    wire, rows, source = memory.wire_gb_per_s, memory.memory_gb_per_s, found.source
    if wire != "auto" and rows != "auto":
        return Rates(wire, rows, "configured")
    if wire != "auto" or rows != "auto":
        source = f"one configured, one {source}"
    return Rates(
        found.wire_gb_per_s if wire == "auto" else wire,
        found.memory_gb_per_s if rows == "auto" else rows,
        source,
    )


def _from_file(name: str) -> Rates:
    try:
        rates = read_json(Path(name))["rates"]
        wire, rows = float(rates["wire_gb_per_s"]), float(rates["memory_gb_per_s"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"memory.rates_file={name} cannot be used ({error!r}); write it with "
            "`ultramem-ds bench comm --json > FILE`"
        ) from None
    return Rates(wire, rows, f"from {name}")


def run_rates(
    memory: MemoryConfig, world: Comm, shard: Comm, device: torch.device, value_bytes: int
) -> Rates:
    """The rates of a run on this machine, the same on all ranks; a collective.

    Args:
        memory: what is configured; its row width is what is read.
        world: all ranks; the slowest one's rates count.
        shard: the ranks that share a copy of the tables, between which the lookups travel.
        device: where this rank computes.
        value_bytes: bytes of one stored value.

    Raises:
        ValueError: ``memory.rates_file`` cannot be used.
    """
    if not need_measuring(memory):
        return planned_rates(memory)
    row_bytes = memory.value_dim * value_bytes
    kind = machine_kind(device, world.world_size, shard.world_size, row_bytes)
    path = cache_dir() / "rates.json"
    measured: Measured | None = world.from_first(_kept(path, kind))
    if measured is not None:
        source = f"measured by an earlier start, kept in {path}"
    else:
        measured = measure_rates(world, shard, device, row_bytes)
        source = f"measured now, kept in {path}"
        if measured.spread > MOST_SPREAD:
            source = (
                f"measured now, not kept: {REPETITIONS} repetitions differ by a factor of "
                f"{measured.spread:.1f}"
            )
        elif world.rank == 0:
            _keep(path, kind, measured)
    found = Rates(measured.wire_gb_per_s, measured.memory_gb_per_s, source)
    return _configured(memory, found)


def machine_kind(device: torch.device, world_size: int, shard_size: int, row_bytes: int) -> str:
    """What a measurement holds for: processor, and how ranks lie on hosts."""
    cuda = device.type == "cuda"
    processor = torch.cuda.get_device_name(device) if cuda else _cpu_name()
    per_host = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
    return (
        f"{processor}, {os.cpu_count()} CPUs, {world_size} ranks, {per_host} per host, tables over "
        f"{shard_size}, rows of {row_bytes} bytes"
    )


def measure_rates(world: Comm, shard: Comm, device: torch.device, row_bytes: int) -> Measured:
    """GB/s sent and read by the slowest rank, all ranks at once; a collective."""
    values_RV = torch.ones(MEMORY_BYTES // row_bytes, row_bytes // 4 or 1, device=device)
    repetitions = [measure_once(world, shard, device, values_RV) for _ in range(REPETITIONS)]
    by_rate = list(zip(*repetitions))
    wire, rows = (max(rates) for rates in by_rate)
    spread = max(max(rates) / min(rates) for rates in by_rate)
    return Measured(wire, rows, spread, time.time())


def measure_once(
    world: Comm, shard: Comm, device: torch.device, values_RV: Tensor
) -> tuple[float, float]:
    """One repetition of :func:`measure_rates`."""
    mine = [
        wire_gb_per_s(shard, ROUNDS, device, WIRE_BYTES),
        memory_gb_per_s(values_RV, ROUNDS, MEMORY_BYTES // 8),
    ]
    wire, rows = (-world.all_reduce_max_(-torch.tensor(mine, device=device))).tolist()
    return wire, rows


def wire_gb_per_s(comm: Comm, rounds: int, device: torch.device, num_bytes: int) -> float:
    """What each rank sends per second in an even all-to-all; the best of the rounds."""
    P = comm.world_size
    payload = torch.ones(P, max(1, num_bytes // 4 // P), device=device)

    def exchange() -> None:
        comm.all_to_all(payload, [1] * P, [1] * P, "rows")

    best_s = _best_s(exchange, rounds, device, comm.barrier)
    return payload.numel() * 4 * (P - 1) / P / best_s / 1e9


def memory_gb_per_s(values_RV: Tensor, rounds: int, num_bytes: int) -> float:
    """Bytes of random rows read per second by a lookup; the best of the rounds."""
    device = values_RV.device
    row_bytes = values_RV.shape[1] * values_RV.element_size()
    entries = max(32, num_bytes // row_bytes)
    offsets = torch.arange(0, entries, 32, device=device)
    # A generator of its own: what a run draws later must not depend on whether this was measured.
    draw = torch.Generator(device).manual_seed(0)
    requests = iter(
        [
            torch.randint(len(values_RV), (entries,), device=device, generator=draw)
            for _ in range(rounds + 1)
        ]
    )

    def read() -> None:
        torch.nn.functional.embedding_bag(next(requests), values_RV, offsets, mode="sum")

    return entries * row_bytes / _best_s(read, rounds, device) / 1e9


def _best_s(
    run: Callable[[], None],
    rounds: int,
    device: torch.device,
    before: Callable[[], None] = lambda: None,
) -> float:
    """Shortest of ``rounds`` after one to warm up."""
    best_s = float("inf")
    for index in range(rounds + 1):
        before()
        start_s = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if index:
            best_s = min(best_s, time.perf_counter() - start_s)
    return best_s


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "CPU")


def _read_cache(path: Path) -> dict[str, Any]:
    """What earlier starts measured; a file that cannot be read counts as none."""
    try:
        known = read_json(path)
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _kept(path: Path, kind: str) -> Measured | None:
    """What an earlier start measured, unless it is too old or not what starts write."""
    try:
        known = Measured(**_read_cache(path)[kind])
    except (KeyError, TypeError, ValueError):
        return None
    return known if known.age_s < MOST_AGE_S else None


def _keep(path: Path, kind: str, measured: Measured) -> None:
    """Add one entry; a directory that cannot be written costs the next start a second."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**_read_cache(path), kind: asdict(measured)})
    except OSError:
        return
