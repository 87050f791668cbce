"""Files that are either whole or absent: temporary name, fsync, rename."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

# Temporary names never end in a suffix that a reader looks for.
TEMPORARY_SUFFIX = ".partial"


def temporary_path(path: Path) -> Path:
    """A name beside ``path`` that no other process on any host uses."""
    return path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}{TEMPORARY_SUFFIX}")


def fsync_directory(path: Path) -> None:
    """Make renames inside a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Write ``path`` as a whole or not at all.

    Yields a binary file. When the block ends it is flushed to disk and renamed to ``path``; when
    the block raises, it is removed and whatever was at ``path`` stays.
    """
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` atomically and durably."""
    with atomic_file(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as indented JSON (:func:`to_json`), atomically and durably."""
    write_text(path, to_json(value, indent=2) + "\n")


def to_json(value: Any, indent: int | None = None) -> str:
    """``value`` as JSON that every reader takes: NaN and infinity become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: if the file is not JSON; the message names it.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
