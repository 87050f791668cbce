"""``inspect-data``: counts, tokenizer, proportions and samples of a prepared directory."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "inspect-data",
        help="print what a prepared directory holds",
        description="Print counts, tokenizer, proportions (share of the tokens, and the default "
        "weight in the mixture) and decoded samples of a directory made by `prepare`.",
    )
    parser.add_argument("data", metavar="DIR", help="a directory made by `prepare`")
    parser.add_argument(
        "--samples", type=int, default=1, metavar="N", help="documents to decode per subset"
    )
    parser.add_argument(
        "--characters", type=int, default=200, metavar="N", help="of each decoded document"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of documents")
    parser.add_argument(
        "--verify", action="store_true", help="read everything and check it against the manifest"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print."""
    from ultramem_ds.data import inspect

    print("\n".join(inspect.describe(args.data)))
    samples = inspect.sample_texts(
        args.data, documents=args.samples, characters=args.characters, seed=args.seed
    )
    for group, document, text in samples:
        print(f"\n{group}, document {document:,}:\n{text!r}")
    if args.verify:
        inspect.verify(args.data)
        print("\nverified: every id, document and checksum is as prepared")
    return 0
