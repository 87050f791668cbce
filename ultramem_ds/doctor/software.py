"""Python, packages, compiler, native kernel, DeepSpeed's ops, GPU."""

from __future__ import annotations

import importlib.util
import platform
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.version import Version

from ultramem_ds.doctor.finding import Finding
from ultramem_ds.kernels import build as native

ROOT = Path(__file__).resolve().parents[2]
STALE_LOCK_S = 600.0  # a build takes a minute


def check_python() -> Iterator[Finding]:
    """Version of the interpreter."""
    yield Finding("python", "ok", f"Python {platform.python_version()} at {sys.executable}")


def requirements(root: Path) -> list[Requirement]:
    """What this package needs: ``install_requires`` of a checkout, else what pip recorded."""
    setup_cfg = root / "setup.cfg"
    if not setup_cfg.is_file():
        needed = map(Requirement, metadata.requires("ultramem_ds") or ())
        return [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    text = setup_cfg.read_text(encoding="utf-8")
    found = re.search(r"^install_requires =\n((?:    .*\n)+)", text, re.MULTILINE)
    assert found, setup_cfg
    return [Requirement(line.strip()) for line in found[1].splitlines()]


def check_packages(root: Path = ROOT) -> Iterator[Finding]:
    """Installed packages against what is required and ``constraints.txt`` (tested)."""
    missing = False
    for requirement in requirements(root):
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = ""
        if version and requirement.specifier.contains(version, prereleases=True):
            continue
        missing = True
        have = f"version {version}" if version else "not installed"
        install = f"make install, or {sys.executable} -m pip install '{requirement}'"
        yield Finding("packages", "fail", f"{requirement} is needed, {have}", install)
    if not missing:
        yield Finding("packages", "ok", "every required package is there")
    for name in ("torch", "deepspeed"):
        yield from _compare(name, root / "constraints.txt")


def _compare(name: str, constraints: Path) -> Iterator[Finding]:
    pins = constraints.read_text() if constraints.is_file() else ""  # they stay in the checkout
    pinned = re.search(rf"^{name}==(\S+)", pins, re.MULTILINE)
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return
    if pinned is None or Version(version).public == Version(pinned[1]).public:
        yield Finding("packages", "ok", f"{name} {version}")
        return
    yield Finding(
        "packages",
        "warn",
        f"{name} {version}, tested with {pinned[1]}",
        f"make install installs {pinned[1]}; otherwise run `make test` on yours once",
    )


def check_kernels() -> Iterator[Finding]:
    """Compiler and the native lookup kernel: built, loaded, and giving the reference's result."""
    try:
        compiler = native.find_compiler()
    except native.BuildError as error:
        yield Finding(
            "kernels",
            "warn",
            f"{error}: CPU lookups use the slower torch path, ZeRO-Offload cannot work",
            "install g++ (apt-get install g++), or set CXX",
        )
        return
    begin = time.perf_counter()
    try:
        library = native.build()
    except native.BuildError as error:
        fix = "install a C++20 compiler (g++ 11 or newer) or set CXX and TORCH_EXTENSIONS_DIR"
        yield Finding("kernels", "warn", f"native lookup kernel: {error}".splitlines()[0], fix)
        return
    took = time.perf_counter() - begin
    difference = _try_lookup()
    if difference > 1e-5:
        yield Finding(
            "kernels",
            "fail",
            f"the native lookup kernel is off by {difference:.2g} from the reference",
            f"rm {library} and run doctor again; if it stays, train with memory.kernel=reference",
        )
        return
    yield Finding(
        "kernels", "ok", f"native lookup kernel works ({compiler}, ready in {took:.1f} s)"
    )


def _try_lookup() -> float:
    """Largest relative difference of the fastest CPU kernel from plain torch on a small lookup."""
    from ultramem_ds.kernels.ops import lookup_reduce

    gen = torch.Generator().manual_seed(0)
    values = torch.randn(64, 16, generator=gen)
    rows = torch.randint(0, 64, (8, 4), generator=gen)
    projectors = torch.randint(0, 4, (8, 4), generator=gen)
    scores = torch.randn(8, 4, 2, generator=gen)
    ours, reference = (
        lookup_reduce(values, rows, projectors, scores, 4, kernel=kernel)
        for kernel in ("auto", "reference")
    )
    return float((ours - reference).abs().max() / reference.abs().max())


def check_deepspeed_ops() -> Iterator[Finding]:
    """Ops that only offload needs, and build locks that a killed build left behind."""
    from ultramem_ds.zero.offload import buildable_ops

    buildable = buildable_ops()
    ninja = importlib.util.find_spec("ninja") or shutil.which("ninja")
    for works, op, use, fix in (
        (
            buildable["cpu_adam"] and ninja,
            "cpu_adam",
            "optimizer offload to CPU",
            "install g++ and ninja, or do not use the offload JSON files of ds_configs/",
        ),
        (
            buildable["async_io"] and ninja,
            "async_io",
            "offload to NVMe",
            "apt-get install libaio-dev, or do not use ds_configs/ultramem_zero3_nvme_offload.json",
        ),
    ):
        if works:
            yield Finding("kernels", "ok", f"DeepSpeed's {op} can be built ({use})")
        else:
            yield Finding("kernels", "warn", f"DeepSpeed's {op} cannot be built: no {use}", fix)
    yield from stale_locks(native.cache_dir().parent)


def stale_locks(directory: Path, age_s: float = STALE_LOCK_S) -> Iterator[Finding]:
    """Locks of torch's extension builder older than a build can take: every start would wait."""
    now = time.time()
    for lock in sorted(directory.glob("**/lock")):
        if lock.is_file() and now - lock.stat().st_mtime > age_s:
            minutes = (now - lock.stat().st_mtime) / 60
            what = (
                f"{lock} is {minutes:.0f} minutes old: a build was killed, the next waits for ever"
            )
            yield Finding("kernels", "fail", what, f"rm {shlex.quote(str(lock))}")


def check_gpu() -> Iterator[Finding]:
    """What torch can compute on, and the backend that ranks will talk through."""
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Finding("gpu", "ok", f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}")
        if not torch.distributed.is_nccl_available():
            fix = "install a torch built with NCCL"
            yield Finding("gpu", "fail", "this torch has no NCCL", fix)
        if importlib.util.find_spec("triton") is None:
            fix = "pip install triton"
            yield Finding("gpu", "warn", "no triton: lookups use the slower torch path", fix)
        return
    if shutil.which("nvidia-smi"):
        yield Finding(
            "gpu",
            "fail",
            f"nvidia-smi is there but torch {torch.__version__} sees no GPU",
            "install torch for your CUDA (README, CUDA); look at CUDA_VISIBLE_DEVICES and the "
            "driver's version; set CUDA_VISIBLE_DEVICES= to train on the CPU",
        )
    elif torch.distributed.is_gloo_available():
        yield Finding("gpu", "ok", "none; ranks compute on the CPU and talk through gloo")
    else:
        fix = "install an official build of torch"
        yield Finding("gpu", "fail", "no GPU, and this torch has no gloo", fix)
