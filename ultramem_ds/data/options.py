"""How inputs are read: what ``prepare`` and ``train-tokenizer`` share."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

RecordFormat: TypeAlias = Literal["text", "completion", "chat"]
TextFiles: TypeAlias = Literal["document", "line"]

DEFAULT_MAX_LINE_BYTES = 32 << 20
# What the largest window of the zstd format's reference decoder needs.
MAX_ZSTD_WINDOW_BYTES = 2 << 30


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What decides how the bytes of an input become documents."""

    text_key: str | None = None  # column of the text, A.B for nested ones; None = the usual names
    max_line_bytes: int = DEFAULT_MAX_LINE_BYTES  # longer lines, records, .txt files are unusable
    text_files: TextFiles = "document"  # a .txt file is one document, or each of its lines is
    encoding: str = "utf-8"  # of files that do not say theirs by a byte-order mark
    format: RecordFormat = "text"  # plain text, prompt with answer, or a list of messages
    max_zstd_window_bytes: int = MAX_ZSTD_WINDOW_BYTES  # of memory, per worker

    def __post_init__(self) -> None:
        if self.max_line_bytes < 1:
            raise ValueError("the longest line must have at least one byte")
        for name, kinds in (("text_files", TextFiles), ("format", RecordFormat)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {get_args(kinds)}")
        if not 1 << 10 <= self.max_zstd_window_bytes <= MAX_ZSTD_WINDOW_BYTES:
            raise ValueError(
                f"a zstd window of {self.max_zstd_window_bytes / 2**20:g} MiB: the limit must be "
                f"between 1 KiB and {MAX_ZSTD_WINDOW_BYTES >> 20} MiB, zstd's own"
            )
        if self.text_key is not None and self.format != "text":
            raise ValueError(f"a text key has no meaning for the format {self.format}")
        object.__setattr__(self, "encoding", _codec(self.encoding))

    @property
    def content(self) -> dict[str, object]:
        """Options that change what is read, those at their defaults left out."""
        return {
            name: value
            for name, value in vars(self).items()
            if name != "max_zstd_window_bytes" and value != getattr(ReadOptions, name)
        }


def _codec(name: str) -> str:
    """The one spelling of an encoding's name."""
    try:
        codec = codecs.lookup(name)
    except LookupError:
        raise ValueError(
            f"unknown encoding {name!r}; for example utf-8, utf-16, latin-1, cp1252, gb18030"
        ) from None
    if not codec._is_text_encoding:
        raise ValueError(f"{name!r} is no encoding of text")
    return codec.name
