"""``bench predict``: what the hardware allows a decode step and a lookup, without the hardware."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``predict`` to the sub-verbs of ``bench``."""
    parser = subparsers.add_parser(
        "predict",
        help="roofline and launch-bound times on A100, H100, H200 and B200, without one",
        description="Counts bytes, operations and launches of a bf16 decode step on torch's meta "
        "device and divides by published rates. --measured compares a document of bench decode; "
        "--figures predicts the paper's decode study on an A100 (minutes).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--size", choices=("151m", "680m", "1.6b", "debug"), default="1.6b")
    parser.add_argument("--batch", type=_counts, default=(1, 16, 64, 256), help="comma-separated")
    parser.add_argument("--kv", type=_names, default=("none",), help="some of none,eighth,full")
    parser.add_argument(
        "--launch-us",
        type=float,
        default=None,
        metavar="US",
        help="least time of a launch within a graph; None: as fitted to one measured step",
    )
    parser.add_argument("--table", choices=("fp32", "bf16"), default="bf16", help="of the lookups")
    parser.add_argument("--parts", action="store_true", help="print each step's products too")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--measured", type=Path, metavar="FILE", help="a document of bench decode")
    other.add_argument("--figures", action="store_true", help="the paper's Figures 1b, 1c, 6c, 7")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.set_defaults(run_bench=run)


def run(args: argparse.Namespace) -> int:
    """Predict, print."""
    from ultramem_ds.bench.predict import LAUNCH_US, PredictConfig, compare, run_predict

    launch_us = LAUNCH_US if args.launch_us is None else args.launch_us
    config = PredictConfig(
        size=args.size,
        batches=args.batch,
        kv_modes=args.kv,
        launch_us=launch_us,
        table_bytes=4 if args.table == "fp32" else 2,
    )
    if args.measured:
        document, show = compare(args.measured), _show_comparison
    elif args.figures:
        from ultramem_ds.bench.predict_figures import run_figures

        document, show = run_figures(launch_us), _show_figures
    else:
        document, show = run_predict(config), _show_prediction
    if args.json:
        print(json.dumps(document))
    else:
        show(document)
        if args.parts and "lookups" in document:
            _show_parts(document)
    return 0


def _table(columns: list[str], rows: list[list[str]]) -> None:
    """Markdown, for the pages."""
    print(f"| {' | '.join(columns)} |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print(f"| {' | '.join(row)} |")


def _show_prediction(document: dict[str, Any]) -> None:
    gpus = list(document["rates"])
    print("Decode step, ms: roofline / launch-bound\n")
    _table(
        ["model", "batch", "KV", "launches", "GB", "GFLOP", *gpus],
        [
            [
                *(row["preset"], str(row["batch"]), row["kv_mode"], str(row["launches"])),
                *(f"{row['bytes_read'] / 1e9:.3f}", f"{row['flops'] / 1e9:.1f}"),
                *(
                    f"{row['gpus'][gpu]['roofline_ms']:.3f} / "
                    f"{row['gpus'][gpu]['launch_bound_ms']:.3f}"
                    for gpu in gpus
                ),
            ]
            for row in document["rows"]
        ],
    )
    print("\nPrograms of a lookup, us on the roofline\n")
    _table(
        ["program", "tokens", "MB", "MFLOP", *gpus],
        [
            [
                *(row["name"], str(row["tokens"])),
                *(f"{row['num_bytes'] / 1e6:.2f}", f"{row['num_flops'] / 1e6:.1f}"),
                *(f"{row['roofline_us'][gpu]:.2f}" for gpu in gpus),
            ]
            for row in document["lookups"]
        ],
    )


def _show_parts(document: dict[str, Any]) -> None:
    print("\nProducts of a decode step\n")
    _table(
        ["model", "batch", "product", "MB", "MFLOP"],
        [
            [
                *(row["preset"], str(row["batch"]), part["name"]),
                *(f"{part['num_bytes'] / 1e6:.2f}", f"{part['num_flops'] / 1e6:.1f}"),
            ]
            for row in document["rows"]
            for part in row["parts"]
        ],
    )


def _show_comparison(document: dict[str, Any]) -> None:
    print(f"{document['gpu']}, ms; {document['launch_us']:.2f} us per launch, fitted to one row\n")
    _table(
        ["model", "batch", "launches", "roofline", "launch-bound", "measured", "of launch-bound"],
        [
            [
                *(row["preset"], str(row["batch"]), str(row["launches"])),
                *(f"{row[key]:.3f}" for key in ("roofline_ms", "launch_bound_ms", "measured_ms")),
                "fitted" if row["fitted"] else f"{row['measured_over_predicted']:.2f}",
            ]
            for row in document["rows"]
        ],
    )


def _show_figures(document: dict[str, Any]) -> None:
    print(f"{document['gpu']}, {document['launch_us']:.2f} us per launch (of an H200)\n")
    _table(
        ["figure", "the paper's text", "predicted", "agrees"],
        [
            [c["figure"], c["paper"], c["predicted"], "yes" if c["agrees"] else "**no**"]
            for c in document["claims"]
        ],
    )
    kinds = list(document["times"][0]["roofline_ms"])
    print("\nDecode step, ms: roofline / launch-bound\n")
    _table(
        ["KV", "batch", *kinds],
        [
            [
                *(row["kv_mode"], str(row["batch"])),
                *(
                    f"{row['roofline_ms'][kind]:.2f} / {row['launch_bound_ms'][kind]:.2f}"
                    for kind in kinds
                ),
            ]
            for row in document["times"]
        ],
    )
    print("\nGrowth\n")
    _table(
        ["variant", "experts or rows", "roofline ms", "launch-bound ms"],
        [
            [
                *(row["variant"], f"{row['experts_or_rows']:,}"),
                *(f"{row['roofline_ms']:.2f}", f"{row['launch_bound_ms']:.2f}"),
            ]
            for row in document["growth"]
        ],
    )
    print("\nSparse weights read by a step, GB\n")
    keys = ("moe_paper", "ultramem_paper", "moe", "ultramem")
    _table(
        ["batch", "MoE, formula", "UltraMem, formula", "MoE", "UltraMem"],
        [
            [f"{row['batch']:,}", *(f"{row[key] / 1e9:.3f}" for key in keys)]
            for row in document["bytes"]
        ],
    )


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(count) for count in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))
