"""``bench comm``: wire and memory rates, and the partition schemes side by side."""

from __future__ import annotations

import argparse

from ultramem_ds.bench.comm import CommBenchConfig, run_comm_bench
from ultramem_ds.bench.common import print_document

_COLUMNS = (
    "variant",
    "direction",
    "time_ms",
    "low_ms",
    "high_ms",
    "rounds",
    "bytes_sent",
    "predicted_bytes",
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``comm`` to the sub-verbs of ``bench``."""
    default = CommBenchConfig()
    parser = subparsers.add_parser(
        "comm",
        help="partition schemes on local ranks, and the rates that memory.partition=auto uses",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--preset", default=default.preset, help="whose memory layer")
    parser.add_argument("--tokens", type=int, default=default.tokens, help="tokens per rank")
    parser.add_argument("--ranks", type=int, default=default.ranks, help="local gloo processes")
    parser.add_argument("--ids", choices=("uniform", "zipf"), default=default.ids)
    parser.add_argument("--rounds", type=int, default=default.rounds)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="as for train")
    parser.set_defaults(run_bench=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    config = CommBenchConfig(
        preset=args.preset,
        overrides=tuple(args.overrides),
        tokens=args.tokens,
        ranks=args.ranks,
        ids=args.ids,
        rounds=args.rounds,
    )
    document = run_comm_bench(config)
    print_document(document, as_json=args.json, columns=_COLUMNS)
    if not args.json:
        for name, rate in document["rates"].items():
            print(f"{name}: {rate:.2f}  (memory.{name}={rate:.2f})")
    return 0
