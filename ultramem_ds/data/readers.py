"""Documents of one unit, streaming: at most one line (or one batch of a table) is in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from ultramem_ds.data.answers import Segment, segments_of
from ultramem_ds.data.options import ReadOptions
from ultramem_ds.data.streams import json_values, lines_between, open_unit, values_of
from ultramem_ds.data.subsets import canonical_subset
from ultramem_ds.data.unit import Unit

# Columns that hold a document's text, in order of preference; RedPajama-V2 has raw_content.
TEXT_KEYS = ("text", "raw_content", "content")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Document:
    """One record with usable text."""

    text: str
    subset: str
    data: bytes  # the text as UTF-8
    segments: tuple[Segment, ...] = ()  # of prompts and answers; empty for plain text


@dataclass(frozen=True)
class BadRecord:
    """One record without usable text."""

    offset: int  # byte of the uncompressed file at which the line starts; row of a table
    reason: str


@dataclass(frozen=True)
class Remark:
    """Something about the file that is worth saying."""

    text: str


Record: TypeAlias = Document | BadRecord | Remark


def read_unit(unit: Unit, options: ReadOptions | None = None) -> Iterator[Record]:
    """Yield the records of ``unit`` in order.

    Raises:
        ValueError: if the file changed since it was listed or is corrupt.
        OSError: if the file cannot be read.
    """
    options = options or ReadOptions()
    rows = _Rows(unit.subset, options)
    if unit.kind in ("parquet", "hub"):
        from ultramem_ds.data.tables import table_rows

        for number, row in table_rows(unit, rows.columns):
            yield from rows.record(row, number)
        return
    with open_unit(unit, options) as (stream, archive):
        if unit.kind == "values":
            for at, value in json_values(stream, unit.path, options.max_line_bytes):
                yield from rows.record(value, at)
        elif unit.kind == "text" and options.text_files == "document":
            yield from _whole_text(stream.read(options.max_line_bytes + 1), unit, options)
        else:
            whole = unit.compression is not None or unit.encoding != "utf-8"
            end = None if whole else unit.end
            for offset, line in lines_between(stream, unit.begin, end, options.max_line_bytes):
                if line is None:
                    reason = f"line longer than {options.max_line_bytes} bytes"
                    yield BadRecord(offset, reason)
                    continue
                line = line.removeprefix(_BOM)
                if line.isspace() or not line:
                    continue
                if unit.kind == "text":
                    yield _text(line.rstrip(b"\r\n"), offset, unit)
                else:
                    yield from _parse(line, offset, rows, unit.encoding)
        while archive is not None and stream.read(1 << 20):
            pass  # to the archive's end, which is checked there
        if archive is not None and archive.trailing_bytes:
            yield Remark(
                f"{archive.trailing_bytes} bytes after the {unit.compression} data are ignored"
            )


def _whole_text(data: bytes, unit: Unit, options: ReadOptions) -> Iterator[Record]:
    if len(data) > options.max_line_bytes:
        yield BadRecord(
            0,
            f"text file longer than {options.max_line_bytes} bytes (--text-files line, or a larger "
            "--max-line-mib)",
        )
    elif data := data.removeprefix(_BOM):
        yield _text(data, 0, unit)


def _text(data: bytes, offset: int, unit: Unit) -> Record:
    try:
        return Document(data.decode("utf-8"), unit.subset, data)
    except UnicodeDecodeError:
        return _undecodable(offset, unit.encoding)


def _undecodable(offset: int, encoding: str) -> BadRecord:
    if encoding == "utf-8":
        return BadRecord(offset, "invalid UTF-8")
    return BadRecord(offset, f"invalid {encoding}")


def _parse(line: bytes, offset: int, rows: _Rows, encoding: str) -> Iterator[Record]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        yield _undecodable(offset, encoding)
        return
    values = values_of(text)
    while True:
        try:
            value = next(values, None)
        except (ValueError, RecursionError):
            yield BadRecord(offset, "not JSON")
            return
        if value is None:
            return
        at, row = value
        yield from rows.record(row, offset + (len(text[:at].encode()) if at else 0))


class _Rows:
    """Rows of any source to documents."""

    def __init__(self, subset: str, options: ReadOptions) -> None:
        self._subset = subset
        self._format = options.format
        self._keys = TEXT_KEYS if options.text_key is None else (options.text_key,)

    @property
    def columns(self) -> tuple[str, ...] | None:
        """Columns of a table that may be needed; None for all."""
        return self._keys if self._format == "text" else None

    def record(self, row: Any, offset: int) -> Iterator[Record]:
        """The record of one row."""
        if not isinstance(row, dict):
            yield BadRecord(offset, "not a JSON object")
            return
        found = self._text(row) if self._format == "text" else segments_of(row, self._format)
        if isinstance(found, str):
            yield BadRecord(offset, found)
            return
        text = "".join(segment.text for segment in found)
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError:  # an escaped lone surrogate
            yield BadRecord(offset, "text is not valid Unicode")
            return
        segments = () if self._format == "text" else found
        yield Document(text, _subset_of_row(row) or self._subset, data, segments)

    def _text(self, row: dict[str, Any]) -> tuple[Segment] | str:
        """The text of a row, or why there is none."""
        present = [(key, value) for key in self._keys if (value := _at(row, key)) is not _ABSENT]
        for _, value in present:
            if isinstance(value, str):
                return (Segment(value),)
        if present:
            return f"{present[0][0]} is not a string"
        lists = [key for key, value in row.items() if isinstance(value, list) and len(value) > 1]
        if lists and isinstance(row[lists[0]][0], dict):
            return f"no {' / '.join(self._keys)}, but a list under {lists[0]}: write one a line"
        return f"no {' / '.join(self._keys)}"


_ABSENT = object()


def _at(row: dict[str, Any], key: str) -> Any:
    """``row[key]``, or the value at the end of the path A.B."""
    if key in row:
        return row[key]
    first, _, rest = key.partition(".")
    inner = row.get(first) if rest else None
    return _at(inner, rest) if isinstance(inner, dict) else _ABSENT


def _subset_of_row(row: dict[str, Any]) -> str | None:
    """SlimPajama's ``meta.redpajama_set_name`` and the 1T-Sample's ``red_pajama_subset``."""
    meta = row.get("meta")
    name = meta.get("redpajama_set_name") if isinstance(meta, dict) else None
    name = name or row.get("red_pajama_subset")
    return canonical_subset(name) if isinstance(name, str) else None
