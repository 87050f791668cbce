"""``bench lookup``: the lookup kernel against embedding_bag and eager gathering."""

from __future__ import annotations

import argparse

from ultramem_ds.bench.common import print_document
from ultramem_ds.bench.lookup import DTYPES, LookupBenchConfig, run_lookup_bench

_COLUMNS = ("tokens", "direction", "variant", "time_ms", "low_ms", "high_ms", "rounds")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``lookup`` to the sub-verbs of ``bench``."""
    default = LookupBenchConfig()
    parser = subparsers.add_parser(
        "lookup",
        help="lookup forward and backward against embedding_bag and eager gathering",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--tokens", type=_counts, default=default.tokens, help="token counts, comma-separated"
    )
    parser.add_argument("--rows", type=int, default=default.num_rows, help="rows of the table")
    parser.add_argument("--value-dim", type=int, default=default.value_dim, help="V")
    parser.add_argument("--entries", type=int, default=default.entries, help="K, rows per token")
    parser.add_argument("--cores", type=int, default=default.num_cores, help="h")
    parser.add_argument("--expansion", type=int, default=default.expansion, help="E")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default=default.dtype)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default.device)
    parser.add_argument("--kernel", default=default.kernel, help="auto or a registered name")
    parser.add_argument("--huge-pages", action="store_true", help="advise 2 MiB pages")
    parser.add_argument("--rounds", type=int, default=default.rounds)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.set_defaults(run_bench=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    config = LookupBenchConfig(
        tokens=args.tokens,
        num_rows=args.rows,
        value_dim=args.value_dim,
        entries=args.entries,
        num_cores=args.cores,
        expansion=args.expansion,
        dtype=args.dtype,
        device=args.device,
        kernel=args.kernel,
        huge_pages=args.huge_pages,
        rounds=args.rounds,
        seed=args.seed,
    )
    print_document(run_lookup_bench(config), as_json=args.json, columns=_COLUMNS)
    return 0


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(count) for count in text.split(","))
