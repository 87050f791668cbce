"""``train-tokenizer``: a small tokenizer from text."""

from __future__ import annotations

import argparse
from typing import Any

from ultramem_ds.cli.reading import add_input, add_reading_options, reading_options


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "train-tokenizer",
        help="train a byte-level BPE or SentencePiece tokenizer",
        description="Train a tokenizer on text, for small experiments; large ones take a published "
        "one, such as GPT-NeoX-20B's tokenizer.json.",
        epilog="example: train-tokenizer --input corpus/ --output tokenizer.json --vocab-size 8192",
    )
    add_input(parser, required=True)
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="file to write, or a directory"
    )
    parser.add_argument(
        "--vocab-size", type=int, default=8192, metavar="N", help="entries (default %(default)s)"
    )
    parser.add_argument(
        "--kind",
        choices=("bpe", "sentencepiece"),
        default="bpe",
        help="bpe writes a tokenizers JSON, sentencepiece a .model (default %(default)s)",
    )
    parser.add_argument(
        "--max-mib",
        type=float,
        default=256.0,
        metavar="F",
        help="text to train on, spread evenly over the inputs' parts (default %(default)s)",
    )
    add_reading_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train and write."""
    from ultramem_ds.data.tokenizer_training import train_on_inputs

    path, tokenizer = train_on_inputs(
        args.input,
        args.output,
        kind=args.kind,
        vocab_size=args.vocab_size,
        max_bytes=int(args.max_mib * 2**20),
        reading=reading_options(args),
    )
    print(f"{path}: {tokenizer.vocab_size:,} entries, end of text {tokenizer.eos_id}")
    return 0
