"""One job at a time in a run directory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

WAIT_S = 90.0  # an earlier job that lost its launcher may still be saving


@contextlib.contextmanager
def only_job(run_dir: Path, wait_s: float = WAIT_S) -> Iterator[None]:
    """Hold ``RUN/lock`` while the block runs; for one process of the job.

    The system lets go of it when the process ends, however it ends.

    Raises:
        ValueError: if another process still trains there after ``wait_s`` seconds.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    # A record lock: unlike flock's, forked loader workers do not inherit it.
    with open(run_dir / "lock", "a+") as file:
        deadline = time.monotonic() + wait_s
        told = False
        while not _lock(file.fileno()):
            file.seek(0)
            owner = file.read().strip() or "another process"
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{run_dir} is in use by {owner}; stop that job first, or use another --run-dir"
                )
            if not told:
                text = f"waiting for {owner}, which still trains in {run_dir}"
                print(text, file=sys.stderr, flush=True)
                told = True
            time.sleep(0.5)
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield


def _lock(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:  # file systems mounted without locks
        print(f"WARNING: {error}: two jobs in one run directory go unnoticed", file=sys.stderr)
    return True
