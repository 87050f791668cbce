"""What an input file is: by its name whether it is meant to be read, by its content how.

The content decides: a name may say .zst and the file be plain text, or a download be a Git LFS
pointer. Reasons for not reading a file are texts for the account of ``prepare``.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import BinaryIO, Literal, TypeAlias

from ultramem_ds.data import compression as compressed
from ultramem_ds.data.compression import Compression, DecompressedFile
from ultramem_ds.data.options import ReadOptions

# One JSON record a line; any sequence of JSON values; a text; a table.
Layout: TypeAlias = Literal["lines", "values", "text", "parquet"]
_Family: TypeAlias = Literal["json", "text", "parquet"]

_FAMILIES: dict[str, _Family] = {
    **dict.fromkeys((".jsonl", ".json", ".ndjson", ".jsonlines", ".jl"), "json"),
    **dict.fromkeys((".txt", ".text"), "text"),
    **dict.fromkeys((".parquet", ".parq", ".pq"), "parquet"),
}
READ_SUFFIXES = ".jsonl, .json, .ndjson, .txt or .parquet, plain or as .gz, .zst, .bz2, .xz"

# Files that lie beside data and hold none.
_BESIDE_DATA = {
    "checksums.txt",
    "config.json",
    "copying.txt",
    "dataset_dict.json",
    "dataset_info.json",
    "dataset_infos.json",
    "generation_config.json",
    "license.txt",
    "manifest.json",
    "notice.txt",
    "readme.txt",
    "requirements.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "urls.txt",
    "vocab.json",
}
_BOMS = (  # the longer ones first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_INDEX = "an index of tokenised data; see prepare --adopt"
_FOREIGN = (
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"),
    (b"Rar!\x1a\x07", "a rar archive; unpack it"),
    (b"\x04\x22\x4d\x18", "compressed by lz4; decompress it"),
    (b"\xff\x06\x00\x00sNaPpY", "compressed by snappy; decompress it"),
    (b"\x1f\x9d", "compressed by compress (.Z); decompress it"),
    (b"ARROW1", "an Arrow file; write it as Parquet"),
    (b"ORC", "an ORC file; write it as Parquet"),
    (b"Obj\x01", "an Avro file; write it as Parquet"),
    (b"PARE", "an encrypted Parquet file"),
    (b"\x89HDF\r\n", "an HDF5 file"),
    (b"SQLite format 3", "an SQLite database"),
    (b"%PDF-", "a PDF document"),
    (b"\x89PNG", "a picture"),
    (b"MMIDIDX", _INDEX),
)
_LFS = re.compile(rb"version https?://(git-lfs\.github\.com|hawser\.github\.com)/spec/")
_MARKUP = re.compile(rb"(<!doctype html|<html|<head|<body)|(<\?xml|<Error>)", re.IGNORECASE)
_HEAD_BYTES = 1 << 16
_TAR_MAGIC = slice(257, 262)


@dataclass(frozen=True)
class Format:
    """How to read a file.

    Attributes:
        layout: of its content.
        compression: None for a plain file.
        encoding: of its text, by Python's name.
        note: where the content is not what the name says; else empty.
    """

    layout: Layout
    compression: Compression | None = None
    encoding: str = "utf-8"
    note: str = ""

    def has_ranges(self, options: ReadOptions) -> bool:
        """Whether any byte range of the file can be read by itself."""
        by_line = self.layout == "lines" or (self.layout == "text" and options.text_files == "line")
        return by_line and self.compression is None and self.encoding == "utf-8"


class NotData(Exception):
    """The file is not read; the message is the reason."""


def stem_of(name: str) -> str:
    """A file's name without the suffixes of what it holds, ``a`` of ``a.jsonl.gz``."""
    while (dot := name.rfind(".")) > 0 and name[dot:].lower() in (_FAMILIES | compressed.SUFFIXES):
        name = name[:dot]
    return name


def recognise(path: Path, options: ReadOptions, *, chosen: bool) -> Format:
    """How to read ``path``.

    Args:
        path: a regular file.
        options: of reading.
        chosen: the file itself was given, not a directory above it; then any suffix will do.

    Raises:
        NotData: with the reason, if it is not to be read.
        ValueError: if its compression is corrupt at the beginning or needs too much memory.
        OSError: if it cannot be read.
    """
    suffixes = [suffix.lower() for suffix in PurePath(path.name).suffixes]
    by_name = compressed.SUFFIXES.get(suffixes[-1]) if suffixes else None
    inner = suffixes[-2:-1] if by_name else suffixes[-1:]
    family = _FAMILIES.get(inner[0]) if inner else None
    if not chosen:
        if path.name.lower() in _BESIDE_DATA:
            raise NotData("a file beside data, by its name")
        if suffixes[-1:] == [".idx"]:
            raise NotData(_INDEX)
        if family is None and by_name is None:
            raise NotData(f"suffix {suffixes[-1]}" if suffixes else "no suffix")
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
        if not head:
            raise NotData("empty file (0 bytes)")
        found = compressed.compression_of(head)
        if found is None and by_name == "lzma" and head[:1] == b"\x5d":
            found = "lzma"
        if found is not None:
            file.seek(0)
            head = _decompressed_head(file, found, path, options)
    _refuse_foreign(head, family)
    note = "" if found == by_name else f"{found or 'not compressed'}, whatever its name says"
    if head.startswith(b"PAR1"):
        if found is not None:
            raise NotData("a compressed Parquet file; decompress it")
        other = "Parquet, whatever its name says" if family != "parquet" else note
        return Format("parquet", note=other)
    if family == "parquet" and head[:1] not in (b"{", b"["):
        raise ValueError(f"{path} is not a Parquet file, whatever its name says")
    return _format_of_text(head, family, found, note, options)


def _decompressed_head(
    file: BinaryIO, compression: Compression, path: Path, options: ReadOptions
) -> bytes:
    stream = DecompressedFile(file, compression, path, options.max_zstd_window_bytes)
    head = io.BufferedReader(stream, _HEAD_BYTES).read(_HEAD_BYTES)
    if compressed.compression_of(head):
        raise NotData("compressed twice; decompress it once")
    return head


def _refuse_foreign(head: bytes, family: _Family | None) -> None:
    """Name what is certainly no text."""
    if _LFS.match(head):
        raise NotData("a Git LFS pointer, not the data; `git lfs pull` fetches it")
    if head[_TAR_MAGIC] == b"ustar":
        raise NotData("a tar archive; unpack it")
    for magic, what in _FOREIGN:
        if head.startswith(magic):
            raise NotData(what)
    markup = _MARKUP.match(head.lstrip(codecs.BOM_UTF8).lstrip())
    if markup and family != "text":
        raise NotData("an HTML page" if markup[1] else "an XML document")


def _format_of_text(
    head: bytes,
    family: _Family | None,
    compression: Compression | None,
    note: str,
    options: ReadOptions,
) -> Format:
    bom = next(((mark, name) for mark, name in _BOMS if head.startswith(mark)), None)
    encoding = bom[1] if bom else options.encoding
    if b"\x00" in head and not encoding.startswith(("utf-16", "utf-32")):
        if head[1:2] == b"\x00" or head[:1] == b"\x00":
            order = "le" if head[1:2] == b"\x00" else "be"
            raise NotData(f"UTF-16 without a byte-order mark? --encoding utf-16-{order} reads it")
        raise NotData("binary data (it has zero bytes)")
    start = codecs.getincrementaldecoder(encoding)("replace").decode(head).lstrip("\ufeff")
    layout = _layout_of(start, family)
    if family != "json" and layout != "text":
        note = note or ("JSON, whatever its name says" if family else "")
    return Format(layout, compression, encoding, note)


def _layout_of(start: str, family: _Family | None) -> Layout:
    """Lines or values for JSON, text for anything else that is meant to be text."""
    begin = start.lstrip()
    first, _, rest = begin.partition("\n")
    if begin[:1] not in ("{", "["):
        if family is None and begin:
            raise NotData("neither JSON by its content nor text by its suffix")
        return "text" if family == "text" else "lines"
    if family == "text" and not _is_json(first):
        return "text"
    # An array, or an object that goes on over lines.
    open_object = bool(rest) and not _is_json(first) and first.rstrip() in ("{", "[", "[{")
    return "values" if open_object or _begins_array(begin) else "lines"


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _begins_array(text: str) -> bool:
    """Whether ``text`` begins as an array of objects that is no line among others."""
    return text[:1] == "[" and text[1:].lstrip()[:1] in ("{", "]", "")
