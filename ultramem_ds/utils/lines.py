"""A file of lines that outlives a full disk."""

from __future__ import annotations

import os
import sys
from pathlib import Path


class LineFile:
    """Appends whole lines; those that do not fit on the disk wait in memory for the next attempt.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._waiting = b""

    def write(self, line: str) -> None:
        """Append ``line``, a line break added, and whatever waits; warns when lines begin to."""
        first_to_wait = not self._waiting
        self._waiting += line.encode() + b"\n"
        end = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(self._waiting) < len(self._waiting):
                raise OSError("no space for a whole line")
        except OSError as error:
            self._file.truncate(end)
            if first_to_wait:
                print(
                    f"WARNING: {self._path} cannot be written: {error}. Its lines wait in memory",
                    file=sys.stderr,
                    flush=True,
                )
        else:
            self._waiting = b""

    def close(self) -> None:
        """Close the file; lines that still wait are lost."""
        self._file.close()
