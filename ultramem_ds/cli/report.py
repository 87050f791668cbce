"""``report``: curves and tables of runs."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "report",
        help="curves and tables of runs as PNG and Markdown",
        description="Write report.md, losses.png and speed.png about one or more runs, finished "
        "or running: losses, throughput, time by phase, memory.",
        epilog="Example: ultramem-ds report runs/demo/dense-debug runs/demo/ultramem-debug "
        "--output report",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where to; default: the first run's directory"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the report and name its files."""
    from ultramem_ds.telemetry.report import write_report

    for path in write_report(arguments.run_dirs, arguments.output or arguments.run_dirs[0]):
        print(path)
    return 0
