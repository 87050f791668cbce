"""What ZeRO-Offload needs of this machine, checked and built before any model is.

DeepSpeed compiles its CPU Adam and its asynchronous file I/O at first use. PyTorch guards that with
a lock file, which a process killed while compiling leaves behind, and on which every later start
waits for ever. Here compiling happens under a kernel lock, and a lock file whose owner is dead, or
whose directory has not changed for long, is removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
from pathlib import Path
from typing import Any

import filelock

from ultramem_ds.config.deepspeed import offload_device
from ultramem_ds.utils.processes import is_abandoned

BUILD_TIMEOUT_S = 1800.0
STALE_AFTER_S = 300.0  # longer than one source file takes to compile

_claimed: dict[Path, int] = {}  # swap directories of this process, with the lock's descriptor


def prepare_offload(engine_config: dict[str, Any], rank: int) -> None:
    """Make ready what the config's offload devices need; nothing without offload.

    Raises:
        ValueError: it cannot be had on this machine; the message says what to install or use.
    """
    devices = {offload_device(engine_config, f"offload_{what}") for what in ("optimizer", "param")}
    if devices == {"none"}:
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder

    if "nvme" in devices:
        if not buildable_ops()["async_io"]:
            raise ValueError(
                "offload to NVMe needs libaio and a C compiler: install it with headers (Debian "
                "and Ubuntu: libaio-dev) or use ds_configs/ultramem_zero3_cpu_offload.json"
            )
        claim_swap_directory(nvme_directory(engine_config), rank)
        build_op(AsyncIOBuilder())
    build_op(CPUAdamBuilder())


def buildable_ops() -> dict[str, bool]:
    """Whether this machine has what compiling each of DeepSpeed's offload ops takes."""
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder

    with contextlib.redirect_stdout(sys.__stderr__):
        return {
            "cpu_adam": bool(CPUAdamBuilder().is_compatible(verbose=False)),
            "async_io": bool(AsyncIOBuilder().is_compatible(verbose=False)),
        }


def nvme_directory(engine_config: dict[str, Any]) -> Path:
    """Where the optimizer state is swapped to."""
    path = engine_config["zero_optimization"].get("offload_optimizer", {}).get("nvme_path")
    if not path:
        raise ValueError(
            "the DeepSpeed JSON offloads to NVMe without a path: set "
            "zero_optimization.offload_optimizer.nvme_path to a directory of a local disk"
        )
    return Path(path)


def claim_swap_directory(directory: Path, rank: int) -> None:
    """Keep this rank's part of a swap directory to this process, to its end.

    DeepSpeed names the files by rank alone: two runs in one directory would overwrite each other's.

    Raises:
        ValueError: another run uses it, or its file system cannot do what libaio needs.
    """
    what = f"zero_optimization.offload_optimizer.nvme_path={directory}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"rank{rank}.lock"
        if path not in _claimed:
            # Direct I/O, past the page cache, is how libaio writes.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o666)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _claimed[path] = descriptor
    except BlockingIOError:
        raise ValueError(f"{what} is in use by another run; give each run its own") from None
    except OSError as error:
        raise ValueError(
            f"{what} cannot be used ({error.strerror}): it must be a writable directory of a disk "
            "with direct I/O, not of a memory file system"
        ) from None


def build_op(builder: Any) -> None:
    """Compile one of DeepSpeed's ops, or wait for the process that does.

    Raises:
        ValueError: it cannot be built here.
    """
    from torch.utils import cpp_extension

    directory = Path(cpp_extension._get_build_directory(builder.name, False))
    with filelock.FileLock(f"{directory}.ultramem-lock", timeout=BUILD_TIMEOUT_S):
        remove_stale_lock(directory)
        try:
            with contextlib.redirect_stdout(sys.__stderr__):
                builder.load(verbose=False)
        except (RuntimeError, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"DeepSpeed's {builder.name} cannot be built here ({reason}): offload needs a C++ "
                "compiler and ninja; use ds_configs/ultramem_zero3.json without them"
            ) from error


def remove_stale_lock(directory: Path) -> None:
    """Remove PyTorch's lock file of a build directory in which nobody is building any more.

    Its owner keeps it open: where that can be seen, it goes as soon as nobody does. Elsewhere this
    waits while files in the directory still change.
    """
    lock = (directory / "lock").resolve()
    while lock.exists():
        newest = max(os.stat(path).st_mtime for path in (directory, *directory.iterdir()))
        if is_abandoned(lock) or time.time() - newest > STALE_AFTER_S:
            print(f"removing {lock}, left behind by a killed process", file=sys.stderr)
            lock.unlink(missing_ok=True)
            return
        time.sleep(1.0)
