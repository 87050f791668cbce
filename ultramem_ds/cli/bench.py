"""``bench``: measurements, one sub-verb each."""

from __future__ import annotations

import argparse

from ultramem_ds.cli import (
    bench_comm,
    bench_decode,
    bench_layer,
    bench_lookup,
    bench_predict,
    bench_step,
)

# A sub-verb is a module with add_parser(subparsers), which sets run_bench(args) -> int.
_SUB_VERBS = (bench_lookup, bench_comm, bench_decode, bench_layer, bench_step, bench_predict)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``bench`` and its sub-verbs to the command line."""
    parser = subparsers.add_parser("bench", help="side-by-side measurements in one run")
    bench_subparsers = parser.add_subparsers(dest="bench_verb", required=True, metavar="WHAT")
    for module in _SUB_VERBS:
        module.add_parser(bench_subparsers)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the sub-verb that was parsed."""
    code: int = args.run_bench(args)
    return code
