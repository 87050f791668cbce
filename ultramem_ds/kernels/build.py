"""Builds the native CPU extension, once per machine, and finds it again.

The file's name carries a hash of all that its contents depend on (source, flags, torch,
CPU), so that an upgrade or another CPU over a shared home directory builds anew. The lock
is a kernel lock on an open file, released when its holder dies however it dies: a lock file left
behind means nothing.

``python -m ultramem_ds.kernels`` builds at install time. ``ULTRAMEM_CXXFLAGS`` adds flags
(``make native-sanitize``: AddressSanitizer and UBSan).
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import filelock
import torch

SOURCE_DIR = Path(__file__).parent / "csrc"
LOCK_TIMEOUT_S = 300.0
_COMPILE_FLAGS = ("-O3", "-march=native", "-std=c++20", "-fPIC", "-fopenmp", "-fno-math-errno")


class BuildError(RuntimeError):
    """The extension cannot be built here; the message says why."""


def compile_flags() -> list[str]:
    """Return the compiler's flags, those of ``ULTRAMEM_CXXFLAGS`` last."""
    return [*_COMPILE_FLAGS, *os.environ.get("ULTRAMEM_CXXFLAGS", "").split()]


def cache_dir() -> Path:
    """Return the directory of built extensions, torch's own convention: TORCH_EXTENSIONS_DIR."""
    default = Path.home() / ".cache" / "torch_extensions"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR", default)) / "ultramem_ds"


def library_path() -> Path:
    """Return where the library for this machine lives, built or not."""
    sources = [path.read_text() for path in sorted(SOURCE_DIR.iterdir())]
    parts = [*sources, *compile_flags(), torch.__version__, _cpu_identity()]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    return cache_dir() / f"native-{digest}.so"


def build() -> Path:
    """Return the path of the built library; compile it (seconds) if it is not there.

    Safe to call from many processes at once: one compiles, the others wait for it. A library
    built earlier needs no compiler.

    Raises:
        BuildError: no compiler, a failed compilation, or an unusable cache directory.
    """
    path = library_path()
    if path.exists():
        return path
    compiler = find_compiler()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_suffix(".lock"), timeout=LOCK_TIMEOUT_S):
            if not path.exists():
                _compile(compiler, path)
    except filelock.Timeout as error:
        message = f"another process has been building {path} for {LOCK_TIMEOUT_S} s"
        raise BuildError(message) from error
    except OSError as error:
        message = f"cannot write {path.parent} ({error}); set TORCH_EXTENSIONS_DIR"
        raise BuildError(message) from error
    return path


def find_compiler() -> str:
    """Return the C++ compiler's path: ``CXX`` if set, else g++, c++ or clang++.

    Raises:
        BuildError: there is none.
    """
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    for candidate in candidates:
        found = shutil.which(candidate)
        if found:
            return found
    raise BuildError(f"no C++ compiler ({', '.join(candidates)}) on PATH")


def _compile(compiler: str, path: Path) -> None:
    """Compile to a temporary name in the cache and rename: no reader sees half a library.

    OpenMP's runtime is not linked: torch has loaded one, and a second one in the process would
    have its own threads.
    """
    torch_dir = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as work_dir:
        library = Path(work_dir, "native.so")
        include = ["-I", str(torch_dir / "include")]
        objects = []
        for source in sorted(SOURCE_DIR.glob("*.cpp")):
            objects.append(str(Path(work_dir, source.stem + ".o")))
            _run([compiler, *compile_flags(), *include, "-c", str(source), "-o", objects[-1]])
        libraries = ["-L", str(torch_dir / "lib"), "-ltorch_cpu", "-lc10"]
        _run([compiler, *compile_flags(), "-shared", *objects, *libraries, "-o", str(library)])
        with library.open("rb") as built:
            os.fsync(built.fileno())
        library.rename(path)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    if done.returncode != 0:
        tail = "\n".join((done.stderr or done.stdout).splitlines()[-5:])
        raise BuildError(f"`{' '.join(command)}` failed:\n{tail}")


def _cpu_identity() -> str:
    """Return what ``-march=native`` looks at: the CPU's model and instruction set flags."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.machine() + platform.processor()
    first_cpu = cpuinfo.read_text().split("\n\n")[0]
    kept = ("model name", "flags", "Features", "CPU part")
    return "\n".join(line for line in first_cpu.splitlines() if line.startswith(kept))
