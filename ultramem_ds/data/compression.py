"""Compressed files as streams: any number of members, bytes after the last one, torn ends.

The four libraries decompress one member (gzip member, zstd frame, bzip2 or xz stream); what
follows it is looked at here, in the same way for all of them.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, TypeAlias

Compression: TypeAlias = Literal["gzip", "zstd", "bzip2", "xz", "lzma"]

SUFFIXES: dict[str, Compression] = {
    ".gz": "gzip",
    ".gzip": "gzip",
    ".zst": "zstd",
    ".zstd": "zstd",
    ".bz2": "bzip2",
    ".bzip2": "bzip2",
    ".xz": "xz",
    ".lzma": "lzma",
}
_READ_BYTES = 1 << 18
_MAGIC_BYTES = 6
# More bytes than this after the last member are not a remark of some tool but lost data.
_MAX_TRAILING_BYTES = 1 << 16


def compression_of(head: bytes) -> Compression | None:
    """The compression that the first bytes of a file announce; None for anything else.

    ``lzma`` has no such mark and is known by its suffix alone.
    """
    if head[:3] == b"\x1f\x8b\x08":
        return "gzip"
    if head[:4] == b"\x28\xb5\x2f\xfd" or (head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5):
        return "zstd"
    if head[:3] == b"BZh" and head[3:4].isdigit():
        return "bzip2"
    return "xz" if head[:6] == b"\xfd7zXZ\x00" else None


def zstd_window_bytes(head: bytes) -> int:
    """Window of the zstd frame that starts here; 0 if it is none.

    RFC 8878, 3.1.1.1: the descriptor says whether a window byte follows; without one the content
    size is the window.
    """
    if head[:4] != b"\x28\xb5\x2f\xfd" or len(head) < 18:
        return 0
    descriptor = head[4]
    if not descriptor & 0x20:
        exponent, mantissa = head[5] >> 3, head[5] & 7
        return (8 + mantissa) << (7 + exponent)
    begin = 5 + (0, 1, 2, 4)[descriptor & 3]
    size = (1, 2, 4, 8)[descriptor >> 6]
    return int.from_bytes(head[begin : begin + size], "little") + (256 if size == 2 else 0)


class _Member(Protocol):
    """What ``bz2``, ``lzma`` and ``zstd`` call a decompressor."""

    eof: bool
    needs_input: bool
    unused_data: bytes

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _GzipMember:
    """``zlib``'s decompressor with the others' interface."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)


def _zstd_member(max_window_bytes: int) -> Any:
    try:
        from compression import zstd  # from Python 3.14 on
    except ImportError:
        import backports.zstd as zstd
    limit = zstd.DecompressionParameter.window_log_max
    return zstd.ZstdDecompressor(options={limit: max_window_bytes.bit_length() - 1})


class DecompressedFile(io.RawIOBase):
    """The content of a compressed file.

    Args:
        file: the compressed bytes, from their beginning.
        compression: of the file.
        path: for messages.
        max_window_bytes: what a zstd frame's window may take of memory.

    Attributes:
        trailing_bytes: at the end, bytes after the last member that are no further one; padding
            by zeros is not counted.
    """

    def __init__(
        self, file: BinaryIO, compression: Compression, path: Path, max_window_bytes: int
    ) -> None:
        super().__init__()
        makers: dict[Compression, Callable[[], Any]] = {
            "gzip": _GzipMember,
            "zstd": lambda: _zstd_member(max_window_bytes),
            "bzip2": bz2.BZ2Decompressor,
            "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
            "lzma": lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE),
        }
        self._new_member = makers[compression]
        self._file = file
        self._compression = compression
        self._path = path
        self._max_window_bytes = max_window_bytes
        self._rest = b""  # compressed bytes read and not yet given to a member
        self._member: _Member | None = self._begin(first=True)
        self.trailing_bytes = 0

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` with as much as one step gives; 0 at the end.

        Raises:
            ValueError: if the file is corrupt, ends inside a member, or needs too large a window.
        """
        while self._member is not None:
            if self._member.needs_input and not self._rest:
                self._rest = self._file.read(_READ_BYTES)
            at_end = self._member.needs_input and not self._rest
            data = self._decompress(self._member, len(buffer))
            if at_end and not data and not self._member.eof:
                raise self._error(f"it ends inside a {self._compression} stream")
            if self._member.eof:
                self._rest = self._member.unused_data
                self._member = self._begin(first=False)
            if data:
                buffer[: len(data)] = data
                return len(data)
        return 0

    def _decompress(self, member: _Member, size: int) -> bytes:
        given, self._rest = (self._rest, b"") if member.needs_input else (b"", self._rest)
        try:
            return member.decompress(given, size)
        except OSError as error:  # bz2's own, without a number
            if error.errno is not None:
                raise
            raise self._error(error) from error
        except Exception as error:  # zlib.error, LZMAError, ZstdError: no common base class
            window = zstd_window_bytes(given)
            if window > self._max_window_bytes:
                raise ValueError(
                    f"{self._path} needs a zstd window of {window >> 20} MiB of memory, more than "
                    f"--max-zstd-window-mib {self._max_window_bytes >> 20}"
                ) from error
            raise self._error(error) from error

    def _begin(self, *, first: bool) -> _Member | None:
        """The next member, None where the file's last one has ended."""
        if not first:
            self._rest = self._rest.lstrip(b"\x00")
        while len(self._rest) < _MAGIC_BYTES and (more := self._file.read(_READ_BYTES)):
            self._rest = self._rest + more if first else (self._rest + more).lstrip(b"\x00")
        if first or (self._rest and compression_of(self._rest) == self._compression):
            member: _Member = self._new_member()
            return member
        self.trailing_bytes = len(self._rest)
        while more := self._file.read(_READ_BYTES):
            self.trailing_bytes += len(more)
        if self.trailing_bytes > _MAX_TRAILING_BYTES:
            raise self._error(
                f"{self.trailing_bytes} bytes that are no {self._compression} follow its last "
                "stream"
            )
        return None

    def _error(self, problem: object) -> ValueError:
        return ValueError(f"{self._path} is corrupt or cut short: {problem}")
