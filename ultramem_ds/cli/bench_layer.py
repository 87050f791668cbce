"""``bench layer``: a memory layer against a plain-torch transcription."""

from __future__ import annotations

import argparse

from ultramem_ds.bench.common import print_document
from ultramem_ds.bench.layer import LayerBenchConfig, run_layer_bench

_COLUMNS = ("tokens", "variant", "time_ms", "low_ms", "high_ms", "speedup", "authors_ms", "void")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``layer`` to the sub-verbs of ``bench``."""
    default = LayerBenchConfig()
    parser = subparsers.add_parser(
        "layer",
        help="a memory layer against a plain-torch transcription",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--preset", default=default.preset)
    parser.add_argument(
        "--tokens", type=_counts, default=default.tokens, help="token counts, comma-separated"
    )
    parser.add_argument("--knum", type=int, default=default.knum, help="0 = the preset's")
    parser.add_argument("--rounds", type=int, default=default.rounds)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument(
        "--keep-memory", action="store_true", help="freed memory stays: no page faults (glibc)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.set_defaults(run_bench=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    config = LayerBenchConfig(
        preset=args.preset,
        tokens=args.tokens,
        knum=args.knum,
        rounds=args.rounds,
        keep_memory=args.keep_memory,
        seed=args.seed,
    )
    print_document(run_layer_bench(config), as_json=args.json, columns=_COLUMNS)
    return 0


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(count) for count in text.split(","))
