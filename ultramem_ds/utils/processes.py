"""The processes above, below and beside this one."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil

_LAUNCHERS = ("deepspeed", "torchrun", "one_node.sh", "multi_node.sh")
_LAUNCHER_MODULES = ("deepspeed.launcher", "torch.distributed", "ultramem_ds.launcher")

_LAUNCHER_FILES = (
    "deepspeed/launcher/launch.py",
    "deepspeed/launcher/runner.py",
    "torch/distributed/run.py",
    "ultramem_ds/launcher.py",
)


def is_launcher(command: list[str]) -> bool:
    """Whether a command line is one of the programs that start ranks."""
    for argument in command:
        name = os.path.basename(argument)
        if name in _LAUNCHERS or argument.startswith(_LAUNCHER_MODULES):
            return True
        if argument.endswith(_LAUNCHER_FILES):
            return True
    return False


def launchers_above() -> list[psutil.Process]:
    """The launchers that this process hangs on: its parent, and its parents in turn.

    Empty unless started as one of several ranks: a plain process may outlive its shell.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return []
    found = []
    for process in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):
            if is_launcher(process.cmdline()):
                found.append(process)
                continue
        break
    return found


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs, as the same process; one that nobody has waited for does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def find_process(pid: int, created: float) -> psutil.Process | None:
    """The live process of that number and start time on this machine."""
    try:
        process = psutil.Process(pid)
        return process if process.create_time() == created and is_alive(process) else None
    except psutil.Error:
        return None


_LOCAL_FILE_SYSTEMS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay")


def is_abandoned(path: Path) -> bool:
    """Whether no process has the file open; False on a file system that others may share.

    Processes whose files this user may not see cannot be building in this user's directory.
    """
    mounts = [m for m in psutil.disk_partitions(all=True) if path.is_relative_to(m.mountpoint)]
    mount = max(mounts, default=None, key=lambda mount: len(mount.mountpoint))
    if mount is None or mount.fstype not in _LOCAL_FILE_SYSTEMS:
        return False
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # it has been closed meanwhile
            if os.readlink(descriptor) == str(path):
                return False
    return True


def kill_children() -> None:
    """Kill what this process has started, loader workers for instance."""
    children = psutil.Process().children(recursive=True)
    for child in children:
        with contextlib.suppress(psutil.Error):
            child.kill()
    psutil.wait_procs(children, timeout=2.0)


def wait_until(condition: Callable[[], bool], timeout_s: float, poll_s: float = 0.1) -> bool:
    """Whether ``condition()`` became true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(poll_s)
    return True
