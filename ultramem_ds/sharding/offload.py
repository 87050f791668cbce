"""What ZeRO-Offload needs of this machine, checked and built before any model is.

DeepSpeed compiles its CPU Adam and its asynchronous file I/O at first use. PyTorch guards that with
a lock file, which a process killed while compiling leaves behind, and on which every later start
waits for ever. Here compiling happens under a kernel lock, and a lock file whose directory has not
changed for long is removed.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import filelock

from ultramem_ds.config.deepspeed import offload_device

BUILD_TIMEOUT_S = 1800.0
STALE_AFTER_S = 300.0  # longer than one source file takes to compile


def prepare_offload(engine_config: dict[str, Any]) -> None:
    """Make ready what the config's offload devices need; nothing without offload.

    Raises:
        ValueError: it cannot be had on this machine; the message says what to install or use.
    """
    devices = {offload_device(engine_config, f"offload_{what}") for what in ("optimizer", "param")}
    if devices == {"none"}:
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder

    if "nvme" in devices:
        with contextlib.redirect_stdout(sys.stderr):
            usable = AsyncIOBuilder().is_compatible(verbose=False)
        if not usable:
            raise ValueError(
                "offload to NVMe needs libaio: install it with its headers (Debian and Ubuntu: "
                "libaio-dev) or use ds_configs/ultramem_zero3_cpu_offload.json"
            )
        _build(AsyncIOBuilder())
    _build(CPUAdamBuilder())


def _build(builder: Any) -> None:
    from torch.utils import cpp_extension

    directory = Path(cpp_extension._get_build_directory(builder.name, False))
    with filelock.FileLock(f"{directory}.ultramem-lock", timeout=BUILD_TIMEOUT_S):
        remove_stale_lock(directory)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                builder.load(verbose=False)
        except (RuntimeError, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"DeepSpeed's {builder.name} cannot be built here ({reason}): offload needs a C++ "
                "compiler and ninja; use ds_configs/ultramem_zero3.json without them"
            ) from error


def remove_stale_lock(directory: Path) -> None:
    """Remove PyTorch's lock file of a build directory in which nobody is building any more.

    Waits while files in it still change.
    """
    lock = directory / "lock"
    while lock.exists():
        newest = max(os.stat(path).st_mtime for path in (directory, *directory.iterdir()))
        if time.time() - newest > STALE_AFTER_S:
            print(f"removing {lock}, left behind by a killed process", file=sys.stderr)
            lock.unlink(missing_ok=True)
            return
        time.sleep(1.0)
