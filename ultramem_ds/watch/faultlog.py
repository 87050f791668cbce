"""``faults.jsonl`` of a run directory: what went wrong, one JSON object per line, never truncated.

``metrics.jsonl`` is the record of the run as it counts: lines past the checkpoint go when a run
resumes. What happened on the way to it stays here.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

FAULTS = "faults.jsonl"


def log_fault(run_dir: Path, kind: str, text: str, **details: Any) -> None:
    """Append one event, and tell the console; one process per event.

    Args:
        run_dir: the run directory.
        kind: a short word: ``bad step``, ``rollback``, ``failure``, ``hang``, ...
        text: for people, on stderr too.
        **details: plain values beside it.

    Raises:
        OSError: the file cannot be written, the disk is full for instance; the console was told.
    """
    event = {"time": round(time.time(), 3), "kind": kind, "text": text, **details}
    line = json.dumps(event) + "\n"
    try:
        # One write of an O_APPEND file: lines of several processes do not mix.
        descriptor = os.open(run_dir / FAULTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)
    finally:
        if text:
            print(text, file=sys.stderr, flush=True)
