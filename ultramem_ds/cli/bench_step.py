"""``bench step``: training tokens per second at equal FLOPs, by the engine that trains."""

from __future__ import annotations

import argparse

from ultramem_ds.bench.common import print_document
from ultramem_ds.bench.step import SHAPES, StepBenchConfig, run_step_bench

_COLUMNS = (
    "ranks",
    "tokens",
    "variant",
    "table_rows",
    "time_ms",
    "low_ms",
    "high_ms",
    "tokens_per_s",
    "speed_of_dense",
    "forward_ms",
    "backward_ms",
    "optimizer_ms",
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``step`` to the sub-verbs of ``bench``."""
    default = StepBenchConfig()
    parser = subparsers.add_parser(
        "step",
        help="training tokens per second of dense, MoE and UltraMem at equal FLOPs",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default=default.shape)
    parser.add_argument("--ranks", type=_counts, default=default.ranks, help="processes")
    parser.add_argument(
        "--sequences", type=_counts, default=default.sequences, help="per rank and step"
    )
    parser.add_argument("--seq-len", type=int, default=default.seq_len)
    parser.add_argument(
        "--knum", type=_counts, default=default.knums, help="table sizes; 0 = the shape's"
    )
    parser.add_argument(
        "--variants",
        type=lambda text: tuple(text.split(",")),
        default=default.variants,
        help="some of plain, dense, moe, ultramem, ultramem-row-sparse, ultramem-catch-up; "
        "dense-, moe-, ultramem-compiled",
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default=default.precision)
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
        ranks=args.ranks,
        sequences=args.sequences,
        seq_len=args.seq_len,
        knums=args.knum,
        variants=args.variants,
        precision=args.precision,
        rounds=args.rounds,
        keep_memory=args.keep_memory,
    )
    print_document(run_step_bench(config), as_json=args.json, columns=_COLUMNS)
    return 0


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(count) for count in text.split(","))
