"""Documents of one unit, streaming: at most one line (or one batch of a table) is in memory."""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeAlias, cast

from ultramem_ds.data.sources import Unit, canonical_subset

# Columns that hold a document's text, in order of preference; RedPajama-V2 has raw_content.
TEXT_KEYS = ("text", "raw_content", "content")
DEFAULT_MAX_LINE_BYTES = 32 << 20
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Document:
    """One record with usable text."""

    text: str
    subset: str
    data: bytes  # the text as UTF-8


@dataclass(frozen=True)
class BadRecord:
    """One record without usable text."""

    offset: int  # byte of the uncompressed file at which the line starts; row of a table
    reason: str


Record: TypeAlias = Document | BadRecord


def read_unit(
    unit: Unit, *, text_key: str | None = None, max_line_bytes: int = DEFAULT_MAX_LINE_BYTES
) -> Iterator[Record]:
    """Yield the records of ``unit`` in order.

    Args:
        unit: what to read.
        text_key: the column of the text; None looks for :data:`TEXT_KEYS`.
        max_line_bytes: longer lines are bad records and are never held in memory.

    Raises:
        ValueError: if the file changed since it was listed or its compression is corrupt.
        OSError: if the file cannot be read.
    """
    keys = TEXT_KEYS if text_key is None else (text_key,)
    if unit.kind in ("parquet", "hub"):
        from ultramem_ds.data.tables import table_rows

        for number, row in table_rows(unit, keys):
            yield _document(row, number, unit.subset, keys)
        return
    for offset, line in _lines(unit, max_line_bytes):
        if line is None:
            yield BadRecord(offset, f"line longer than {max_line_bytes} bytes")
        elif not line.isspace():
            yield _parse(line, offset, unit.subset, keys)


def _parse(line: bytes, offset: int, subset: str, keys: tuple[str, ...]) -> Record:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return BadRecord(offset, "invalid UTF-8")
    except (ValueError, RecursionError):
        return BadRecord(offset, "not JSON")
    if not isinstance(row, dict):
        return BadRecord(offset, "not a JSON object")
    return _document(row, offset, subset, keys)


def _document(row: dict[str, Any], offset: int, subset: str, keys: tuple[str, ...]) -> Record:
    key = next((key for key in keys if key in row), None)
    if key is None:
        return BadRecord(offset, f"no {' / '.join(keys)}")
    text = row[key]
    if not isinstance(text, str):
        return BadRecord(offset, f"{key} is not a string")
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:  # an escaped lone surrogate
        return BadRecord(offset, f"{key} is not valid Unicode")
    return Document(text, _subset_of_row(row) or subset, data)


def _subset_of_row(row: dict[str, Any]) -> str | None:
    """SlimPajama's ``meta.redpajama_set_name`` and the 1T-Sample's ``red_pajama_subset``."""
    meta = row.get("meta")
    name = meta.get("redpajama_set_name") if isinstance(meta, dict) else None
    name = name or row.get("red_pajama_subset")
    return canonical_subset(name) if isinstance(name, str) else None


def _lines(unit: Unit, max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """(offset, line) of every line that starts inside the unit; None for an overlong one."""
    with open(unit.path, "rb", buffering=_BLOCK_BYTES) as file:
        size = os.fstat(file.fileno()).st_size
        if size != unit.size:
            raise ValueError(
                f"{unit.path} changed while it was prepared: {unit.size} -> {size} bytes"
            )
        if unit.kind == "lines":
            yield from _lines_between(file, unit.begin, unit.end, max_bytes)
            return
        stream = _decompress(file, unit)
        try:
            yield from _lines_between(stream, 0, None, max_bytes)
        except (EOFError, OSError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the file system's, not the decompressor's
            raise ValueError(f"{unit.path} is corrupt or cut short: {error}") from error


def _decompress(file: BinaryIO, unit: Unit) -> BinaryIO:
    if unit.kind == "gzip":
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    import pyarrow  # here, because it takes long to import

    # Arrow's stream, because python-zstandard's ends a truncated file without an error.
    return cast(
        BinaryIO, io.BufferedReader(pyarrow.input_stream(file, compression="zstd"), _BLOCK_BYTES)
    )


def _lines_between(
    stream: BinaryIO, begin: int, end: int | None, max_bytes: int
) -> Iterator[tuple[int, bytes | None]]:
    position = begin
    if begin > 0:
        # The line that covers byte begin - 1 belongs to the range before this one.
        stream.seek(begin - 1)
        position = _skip_line(stream, begin - 1, end)
    while end is None or position < end:
        line = stream.readline(max_bytes + 1)
        if not line:
            return
        start, position = position, position + len(line)
        if len(line) > max_bytes and not line.endswith(b"\n"):
            position = _skip_line(stream, position, end)
            yield start, None
        else:
            yield start, line


def _skip_line(stream: BinaryIO, position: int, end: int | None) -> int:
    """Read up to the next line's start, or until ``end`` is passed; returns the position."""
    while end is None or position < end:
        part = stream.readline(_BLOCK_BYTES)
        position += len(part)
        if not part or part.endswith(b"\n"):
            break
    return position
