"""``bench step``: training tokens per second at equal FLOPs."""

from __future__ import annotations

import argparse

from ultramem_ds.bench.common import print_document
from ultramem_ds.bench.step import SHAPES, StepBenchConfig, run_step_bench

_COLUMNS = ("tokens", "variant", "table_rows", "time_ms", "low_ms", "high_ms", "tokens_per_s")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``step`` to the sub-verbs of ``bench``."""
    default = StepBenchConfig()
    parser = subparsers.add_parser(
        "step",
        help="training tokens per second of dense, MoE and UltraMem at equal FLOPs",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default=default.shape)
    parser.add_argument("--sequences", type=_counts, default=default.sequences)
    parser.add_argument("--seq-len", type=int, default=default.seq_len)
    parser.add_argument(
        "--knum", type=_counts, default=default.knums, help="table sizes; 0 = the shape's"
    )
    parser.add_argument("--rounds", type=int, default=default.rounds)
    parser.add_argument(
        "--keep-memory", action="store_true", help="freed memory stays: no page faults (glibc)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.set_defaults(run_bench=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    config = StepBenchConfig(
        shape=args.shape,
        sequences=args.sequences,
        seq_len=args.seq_len,
        knums=args.knum,
        rounds=args.rounds,
        keep_memory=args.keep_memory,
    )
    print_document(run_step_bench(config), as_json=args.json, columns=_COLUMNS)
    return 0


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(count) for count in text.split(","))
