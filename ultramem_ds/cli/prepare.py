"""``prepare``: text to ``.bin/.idx``."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from ultramem_ds.cli.reading import add_input, add_reading_options, reading_options

if TYPE_CHECKING:
    from ultramem_ds.data.prepare import PrepareConfig


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
    add_input(source)
    source.add_argument(
        "--add-validation",
        nargs="+",
        action="extend",
        metavar="NAME=PATH",
        help="tokenise PATH into the held-out subset NAME of the finished DIR, with its tokenizer; "
        "everything else stays as it is",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to fill")
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="tokenizer.json, SentencePiece .model, a directory with one, or a Hugging Face model "
        "id",
    )
    parser.add_argument(
        "--eod-token",
        metavar="TOKEN",
        help="token that ends every document (default: as tokenizer_config.json, "
        "special_tokens_map.json or generation_config.json beside the tokenizer say)",
    )
    missing = parser.add_mutually_exclusive_group()
    missing.add_argument(
        "--add-eod",
        action="store_true",
        help="with --adopt: rewrite pairs so that every document ends in the end-of-text id",
    )
    missing.add_argument(
        "--accept-no-eod",
        action="store_true",
        help="with --adopt: take documents without an end-of-text id as they are",
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
        "--max-bad-share",
        type=float,
        default=0.01,
        metavar="F",
        help="share of unusable records beyond which to stop; 20 are always tolerated "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="make an error of whatever would be skipped, ignored or lost",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a finished DIR that was made from other inputs or options",
    )
    add_reading_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prepare, and say what is there."""
    from ultramem_ds.data.inspect import describe

    _check(args)
    if args.adopt:
        _adopt(args)
    elif args.add_validation:
        _add_validation(args)
    elif not _prepare(args):
        print("this shard is finished; the last one to finish will merge")
        return 0
    print("\n".join(describe(args.output)))
    return 0


def _check(args: argparse.Namespace) -> None:
    """Options that go with some sources only."""
    if args.tokenizer is None and not args.add_validation:
        raise ValueError("--tokenizer is missing: the file that the text is tokenised with")
    for name in ("add_eod", "accept_no_eod"):
        if getattr(args, name) and not args.adopt:
            raise ValueError(f"--{name.replace('_', '-')} is for --adopt")


def _adopt(args: argparse.Namespace) -> None:
    from ultramem_ds.data.adopt import adopt

    missing: Any = "add" if args.add_eod else "accept" if args.accept_no_eod else "refuse"
    adopt(args.output, args.tokenizer, eod_token=args.eod_token, missing_eod=missing)


def _add_validation(args: argparse.Namespace) -> None:
    from ultramem_ds.data.added import add_validation

    for text in args.add_validation:
        add_validation(args.output, text, _config(args), tokenizer_path=args.tokenizer)


def _prepare(args: argparse.Namespace) -> bool:
    """Whether everything is finished, other shards included."""
    from ultramem_ds.data.prepare import prepare

    return prepare(args.input, args.output, args.tokenizer, _config(args)) is not None


def _config(args: argparse.Namespace) -> PrepareConfig:
    from ultramem_ds.data.prepare import PrepareConfig
    from ultramem_ds.data.subsets import HELD_OUT

    return PrepareConfig(
        workers=args.workers,
        shard=args.shard,
        validation_share=args.validation_share,
        held_out=(*HELD_OUT, *args.held_out),
        drop_duplicates=args.drop_duplicates,
        reading=reading_options(args),
        eod_token=args.eod_token,
        max_bad_share=args.max_bad_share,
        strict=args.strict,
        overwrite=args.overwrite,
    )


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    try:
        return int(index), int(count)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N") from None
