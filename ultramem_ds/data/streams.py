"""The bytes of a unit as UTF-8, and how they are cut into lines or JSON values."""

from __future__ import annotations

import codecs
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

from ultramem_ds.data.compression import DecompressedFile
from ultramem_ds.data.options import ReadOptions
from ultramem_ds.data.unit import Unit

BLOCK_BYTES = 1 << 20
# Stands for bytes that an encoding does not know; no UTF-8 text holds this byte.
_UNDECODABLE = ("\udcff", "surrogateescape")

Piece: TypeAlias = tuple[int, bytes | None]  # where it starts; None for one that is too long


class _AsUtf8(io.RawIOBase):
    """A stream of another encoding as UTF-8; what cannot be decoded becomes a byte 0xFF."""

    def __init__(self, stream: BinaryIO, encoding: str) -> None:
        super().__init__()
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)("ultramem_ds.undecodable")
        self._ready = b""
        self._ended = False

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` with what there is; 0 at the end."""
        while not self._ready and not self._ended:
            data = self._stream.read(BLOCK_BYTES)
            self._ended = not data
            text = self._decoder.decode(data, final=self._ended)
            self._ready = text.encode("utf-8", _UNDECODABLE[1])
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


def _undecodable(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return _UNDECODABLE[0], error.end


codecs.register_error("ultramem_ds.undecodable", _undecodable)


@contextmanager
def open_unit(
    unit: Unit, options: ReadOptions
) -> Iterator[tuple[BinaryIO, DecompressedFile | None]]:
    """The whole file of ``unit``, decompressed and as UTF-8; and the decompressor, if any.

    Raises:
        ValueError: if the file changed since it was listed.
    """
    with open(unit.path, "rb", buffering=BLOCK_BYTES) as file:
        size = os.fstat(file.fileno()).st_size
        if size != unit.size:
            raise ValueError(
                f"{unit.path} changed while it was prepared: {unit.size} -> {size} bytes"
            )
        stream: BinaryIO = file
        archive = None
        if unit.compression is not None:
            archive = DecompressedFile(
                file, unit.compression, Path(unit.path), options.max_zstd_window_bytes
            )
            stream = cast(BinaryIO, io.BufferedReader(archive, BLOCK_BYTES))
        if unit.encoding != "utf-8":
            recoded = _AsUtf8(stream, unit.encoding)
            stream = cast(BinaryIO, io.BufferedReader(recoded, BLOCK_BYTES))
        yield stream, archive


def lines_between(stream: BinaryIO, begin: int, end: int | None, max_bytes: int) -> Iterator[Piece]:
    """(offset, line) of every line that starts in [begin, end); None for an overlong one.

    Args:
        stream: seekable if ``begin`` is not 0.
        begin: byte of the stream.
        end: byte of the stream; None reads to its end.
        max_bytes: longer lines are not held in memory.
    """
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
        part = stream.readline(BLOCK_BYTES)
        position += len(part)
        if not part or part.endswith(b"\n"):
            break
    return position


def values_of(text: str) -> Iterator[tuple[int, Any]]:
    """(character, value) of the JSON values of a line, which stand side by side or in an array.

    Raises:
        ValueError: where something is no JSON.
    """
    decoder = json.JSONDecoder()
    at = 0
    while at < len(text):
        if text[at].isspace() or (at and text[at] == ","):
            at += 1
            continue
        value, end = decoder.raw_decode(text, at)
        for element in value if isinstance(value, list) else (value,):
            yield at, element
        at = end


def json_values(stream: BinaryIO, path: str, max_bytes: int) -> Iterator[tuple[int, Any]]:
    """(character, value) of the values of a whole file, those inside top-level arrays singly.

    Raises:
        ValueError: where the file is no JSON, or a value is longer than ``max_bytes``: what follows
            could not be told apart.
    """
    to_text = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    decoder = json.JSONDecoder()
    text, base, at, depth, ended = "", 0, 0, 0, False
    while True:
        while at < len(text) and (text[at].isspace() or text[at] in "[,]\ufeff"):
            depth += {"[": 1, "]": -1}.get(text[at], 0)
            at += 1
        if at == len(text) and ended:
            if depth:
                raise ValueError(f"{path}: its JSON array is cut short")
            return
        try:
            if at == len(text):
                raise ValueError("nothing yet")
            value, end = decoder.raw_decode(text, at)
            if end == len(text) and not ended:
                raise ValueError("a number may go on")
        except (ValueError, RecursionError) as error:
            if ended or len(text) - at > max_bytes:
                problem = "longer than --max-line-mib" if not ended else "no JSON"
                raise ValueError(
                    f"{path}: the record that begins at character {base + at} is {problem}; what "
                    f"follows it cannot be read ({error})"
                ) from error
            data = stream.read(max(BLOCK_BYTES, len(text) - at))
            more = to_text.decode(data, final=not data)
            base, text, at, ended = base + at, text[at:] + more, 0, not data
            continue
        yield base + at, value
        at = end
