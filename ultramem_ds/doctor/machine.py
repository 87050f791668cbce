"""Memory, limits, shared memory, name resolution, disk."""

from __future__ import annotations

import os
import resource
import shlex
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from ultramem_ds.doctor.finding import Finding
from ultramem_ds.train.dry_run import existing_parent
from ultramem_ds.utils.environment import world_of

SHM = Path("/dev/shm")
SEGMENTS = "deepspeed_allreduce_buffer_*"
MIN_OPEN_FILES = 4096
MIN_SHM_BYTES = 256 << 20
SLOW_WRITE_MB_PER_S = 50.0
WRITE_BYTES = 64 << 20
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def check_limits() -> Iterator[Finding]:
    """Cores, memory, open files, huge pages."""
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"{cores} cores, {memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    yield Finding("machine", "ok", text)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < MIN_OPEN_FILES:
        what = f"{soft} open files allowed; loaders and many ranks need {MIN_OPEN_FILES}"
        limit = "limits.conf" if 0 <= hard < MIN_OPEN_FILES else "your shell or job script"
        yield Finding("machine", "warn", what, f"ulimit -n {MIN_OPEN_FILES} in {limit}")
    if THP.exists() and "[never]" in THP.read_text():
        yield Finding(
            "machine",
            "warn",
            "transparent huge pages are off; large tables are read up to twice as slowly on CPUs",
            f"echo madvise | sudo tee {THP}",
        )


def check_shared_memory(directory: Path = SHM) -> Iterator[Finding]:
    """Space in /dev/shm, and what dead runs left there."""
    if not directory.is_dir():
        return
    free = shutil.disk_usage(directory).free
    if free < MIN_SHM_BYTES:
        yield Finding(
            "machine",
            "warn",
            f"{directory} has {free / 1e6:.0f} MB free; NCCL and loaders may fail there",
            "remove leftovers, or start the container with --shm-size=8g (or --ipc=host)",
        )
    else:
        yield Finding("machine", "ok", f"{directory} has {free / 1e9:.1f} GB free")
    used = _mapped_files(directory)
    stale = [path for path in sorted(directory.glob(SEGMENTS)) if str(path) not in used]
    if stale:
        size = sum(path.stat().st_size for path in stale)
        yield Finding(
            "machine",
            "warn",
            f"{len(stale)} shared-memory segments of dead runs hold {size / 1e6:.0f} MB",
            f"rm {shlex.join(map(str, stale))}",  # not those of runs that live
        )


def _mapped_files(directory: Path) -> set[str]:
    """Files under ``directory`` that a process of ours has mapped."""
    found = set()
    for process in psutil.process_iter():
        try:
            found |= {m.path for m in process.memory_maps() if m.path.startswith(str(directory))}
        except (psutil.Error, OSError):
            continue  # gone, or somebody else's
    return found


def check_names() -> Iterator[Finding]:
    """Whether this host finds itself and, in a launched job, its master."""
    names = [socket.gethostname()]
    if world_of(os.environ).size > 1 and os.environ.get("MASTER_ADDR", names[0]) != names[0]:
        names.append(os.environ["MASTER_ADDR"])
    for name in names:
        try:
            address = socket.gethostbyname(name)
        except OSError as error:
            fix = f"add {name} to /etc/hosts or DNS, or set GLOO_SOCKET_IFNAME / NCCL_SOCKET_IFNAME"
            yield Finding("machine", "fail", f"the name {name} does not resolve: {error}", fix)
        else:
            yield Finding("machine", "ok", f"{name} is {address}")


def check_disk(run_dir: Path, needed_bytes: int = 0) -> Iterator[Finding]:
    """Where a run would write: space, speed of a durable write, atomic rename.

    Args:
        run_dir: existing or not; a temporary file is written beside it and removed.
        needed_bytes: for the checkpoints that are kept and one more; 0 = unknown.
    """
    here = existing_parent(run_dir)
    free = shutil.disk_usage(here).free
    if free < needed_bytes:
        yield Finding(
            "disk",
            "fail",
            f"{here} has {free / 1e9:.1f} GB free, checkpoints need {needed_bytes / 1e9:.1f} GB",
            "free some, or use another --run-dir",
        )
    elif needed_bytes:
        what = f"{free / 1e9:.1f} GB free on {here}, checkpoints need {needed_bytes / 1e9:.1f} GB"
        yield Finding("disk", "ok", what)
    else:
        yield Finding("disk", "ok", f"{free / 1e9:.1f} GB free on {here}")
    try:
        with tempfile.TemporaryDirectory(dir=here, prefix=".ultramem-doctor-") as scratch:
            speed = _durable_write(Path(scratch), min(WRITE_BYTES, max(1, free // 4)))
    except OSError as error:
        yield Finding("disk", "fail", f"cannot write in {here}: {error}", "use another --run-dir")
        return
    if speed < SLOW_WRITE_MB_PER_S:
        yield Finding(
            "disk",
            "warn",
            f"durable writes reach {speed:.0f} MB/s: saving will take long",
            "use a local disk or a parallel file system, or a larger train.save_every",
        )
    else:
        yield Finding("disk", "ok", f"write, fsync and rename work, {speed:.0f} MB/s")


def _durable_write(scratch: Path, size: int) -> float:
    """MB/s of one file written, synced and renamed over another, as checkpoints are."""
    payload = os.urandom(1 << 20)
    target = scratch / "latest"
    target.write_bytes(b"old")
    begin = time.perf_counter()
    with open(scratch / "new", "wb") as file:
        for _ in range(max(1, size // len(payload))):
            file.write(payload)
        file.flush()
        os.fsync(file.fileno())
        written = file.tell()
    seconds = time.perf_counter() - begin
    os.replace(scratch / "new", target)
    if target.stat().st_size != written:
        raise OSError(f"a renamed file has {target.stat().st_size} bytes instead of {written}")
    return written / seconds / 1e6
