"""``prepare``: text to ``.bin/.idx``."""

from __future__ import annotations

import argparse
import os
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "prepare",
        help="tokenise text into .bin/.idx files that `train` reads",
        description="Tokenise text into one .bin/.idx pair per subset (Megatron-LM's format), with "
        "a held-out split and a manifest. Repeat the command after an interruption: it does only "
        "what is missing.",
        epilog="example: prepare --input /data/redpajama-1t --output prepared --tokenizer "
        "tokenizer.json --workers 16. Over machines: the same command with --shard 0/32, 1/32, ... "
        "(launch/prepare_slurm.sh); the last shard to finish merges.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--adopt",
        action="store_true",
        help="make a manifest for .bin/.idx pairs of other programs that lie in DIR (held-out ones "
        "in DIR/validation); nothing is tokenised",
    )
    source.add_argument(
        "--input",
        nargs="+",
        metavar="PATH",
        help=".jsonl, .json.gz, .jsonl.zst or .parquet files; directories, searched recursively; "
        "SUBSET=PATH to name the subset; hf:OWNER/NAME[:CONFIG[:SPLIT]] for a Hugging Face dataset",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to fill")
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="FILE",
        help="tokenizer.json, SentencePiece .model, or a Hugging Face model id",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes on this machine (default: one per core, here %(default)s)",
    )
    parser.add_argument(
        "--shard",
        type=_shard,
        default=(0, 1),
        metavar="I/N",
        help="do only the I-th of N parts of the work; count from 0 or from 1",
    )
    parser.add_argument(
        "--validation-share",
        type=float,
        default=0.005,
        metavar="F",
        help="share of the documents held out, chosen by content hash (default %(default)s)",
    )
    parser.add_argument(
        "--held-out",
        nargs="+",
        default=[],
        metavar="SUBSET",
        help="subsets that go to validation whole, beside C4's validation files",
    )
    parser.add_argument(
        "--drop-duplicates",
        action="store_true",
        help="keep only the first of equal documents (held-out subsets first); by default they are "
        "counted and reported",
    )
    parser.add_argument(
        "--text-key",
        metavar="NAME",
        help="column of the text (default: text, raw_content, content)",
    )
    parser.add_argument(
        "--max-bad-share",
        type=float,
        default=0.01,
        metavar="F",
        help="share of unusable records beyond which to stop; 20 are always tolerated "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--max-line-mib",
        type=float,
        default=32.0,
        metavar="F",
        help="longer lines count as unusable (default %(default)s)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a finished DIR that was made from other inputs or options",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prepare, and say what is there."""
    from ultramem_ds.data.inspect import describe

    if not (_adopt(args) if args.adopt else _prepare(args)):
        print("this shard is finished; the last one to finish will merge")
        return 0
    print("\n".join(describe(args.output)))
    return 0


def _adopt(args: argparse.Namespace) -> bool:
    from ultramem_ds.data.adopt import adopt

    adopt(args.output, args.tokenizer)
    return True


def _prepare(args: argparse.Namespace) -> bool:
    """Whether everything is finished, other shards included."""
    from ultramem_ds.data.prepare import PrepareConfig, prepare
    from ultramem_ds.data.sources import HELD_OUT

    config = PrepareConfig(
        workers=args.workers,
        shard=args.shard,
        validation_share=args.validation_share,
        held_out=(*HELD_OUT, *args.held_out),
        drop_duplicates=args.drop_duplicates,
        text_key=args.text_key,
        max_bad_share=args.max_bad_share,
        max_line_bytes=int(args.max_line_mib * 2**20),
        overwrite=args.overwrite,
    )
    return prepare(args.input, args.output, args.tokenizer, config) is not None


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    try:
        return int(index), int(count)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N") from None
