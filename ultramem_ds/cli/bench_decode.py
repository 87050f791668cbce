"""``bench decode``: one decode step of dense, PKM, MoE and UltraMem."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ultramem_ds.bench.common import print_document
from ultramem_ds.bench.decode import (
    DTYPES,
    FAMILIES,
    DecodeBenchConfig,
    run_decode_bench,
)

_COLUMNS = (
    "kv_mode",
    "batch",
    "preset",
    "time_ms",
    "low_ms",
    "high_ms",
    "bytes_read",
    "distinct_experts",
    "distinct_rows",
    "roofline_share",
    "fair",
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``decode`` to the sub-verbs of ``bench``."""
    default = DecodeBenchConfig()
    parser = subparsers.add_parser(
        "decode",
        help="one decode step of dense, PKM, MoE and UltraMem of one size",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--size", choices=sorted(FAMILIES), default=default.size)
    parser.add_argument(
        "--batch", type=_counts, default=default.batches, help="batch sizes, comma-separated"
    )
    parser.add_argument(
        "--kv",
        type=_names,
        default=default.kv_modes,
        help="cached keys and values: some of none,eighth,full",
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), default=default.dtype)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default.device)
    parser.add_argument("--rounds", type=int, default=default.rounds)
    parser.add_argument("--sample-s", type=float, default=default.sample_s)
    parser.add_argument(
        "--growth", action="store_true", help="also grow UltraMem's table and MoE's experts"
    )
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--plots", type=Path, metavar="DIR", help="also write plots there")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.set_defaults(run_bench=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print, plot."""
    config = DecodeBenchConfig(
        size=args.size,
        batches=args.batch,
        kv_modes=args.kv,
        dtype=args.dtype,
        device=args.device,
        rounds=args.rounds,
        sample_s=args.sample_s,
        growth=args.growth,
        seed=args.seed,
    )
    document = run_decode_bench(config)
    print_document(document, as_json=args.json, columns=_COLUMNS)
    for ratio in document["ratios"]:
        print(_ratio_line(ratio), file=sys.stderr if args.json else sys.stdout)
    if args.plots:
        from ultramem_ds.bench.decode_plots import plot_decode

        for path in plot_decode(document, args.plots):
            print(path, file=sys.stderr)
    return 0


def _ratio_line(ratio: dict[str, Any]) -> str:
    value = f"{ratio['value']:.2f}"
    shown = f"void ({value}: MoE below its roofline)" if ratio["void"] else value
    return f"{ratio['ratio']} at batch {ratio['batch']}, kv {ratio['kv_mode']}: {shown}"


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(count) for count in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))
