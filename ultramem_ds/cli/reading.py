"""Options of reading text, the same for every verb that does."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from ultramem_ds.data.options import ReadOptions

INPUT_HELP = (
    ".jsonl, .json, .ndjson, .txt or .parquet files, plain or as .gz, .zst, .bz2, .xz; "
    "directories, searched recursively, links followed; SUBSET=PATH to name the subset; "
    "hf:OWNER/NAME[:CONFIG[:SPLIT]] for a Hugging Face dataset"
)


def add_input(parser: Any, **more: Any) -> None:
    """``--input PATH...``, which may be repeated."""
    parser.add_argument(
        "--input", nargs="+", action="extend", metavar="PATH", help=INPUT_HELP, **more
    )


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """How the bytes of an input become documents."""
    group = parser.add_argument_group("reading")
    group.add_argument(
        "--text-key",
        metavar="NAME",
        help="column of the text, A.B for a nested one (default: text, raw_content, content)",
    )
    group.add_argument(
        "--format",
        choices=("text", "completion", "chat"),
        default="text",
        help="completion: a prompt and its answer; chat: a list of messages. The loss then counts "
        "on answers alone (default %(default)s)",
    )
    group.add_argument(
        "--text-files",
        choices=("document", "line"),
        default="document",
        help="a .txt file is one document, or every line of it is (default %(default)s)",
    )
    group.add_argument(
        "--encoding",
        default="utf-8",
        metavar="NAME",
        help="of files without a byte-order mark (default %(default)s)",
    )
    group.add_argument(
        "--max-line-mib",
        type=float,
        default=32.0,
        metavar="F",
        help="longer lines, JSON values and .txt files count as unusable (default %(default)s)",
    )
    group.add_argument(
        "--max-zstd-window-mib",
        type=int,
        default=2048,
        metavar="N",
        help="memory per worker that a .zst file may ask for (default %(default)s, zstd's limit)",
    )


def reading_options(args: argparse.Namespace) -> ReadOptions:
    """What :func:`add_reading_options` was given.

    Raises:
        ValueError: for a value that cannot be.
    """
    from ultramem_ds.data.options import ReadOptions

    return ReadOptions(
        text_key=args.text_key,
        format=cast(Any, args.format),
        text_files=cast(Any, args.text_files),
        encoding=args.encoding,
        max_line_bytes=int(args.max_line_mib * 2**20),
        max_zstd_window_bytes=args.max_zstd_window_mib << 20,
    )
