"""``import``: an exported model as a run directory."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "import",
        help="make a run directory of an exported model",
        description="Read a directory of `export --format hf` (also one that transformers has "
        "saved since), or a checkpoint of the authors' release (config.yaml and model.pt), into a "
        "new run directory at step 0: same weights, moments zero.",
        epilog="Example: ultramem-ds import --input mine-hf --output runs/back --world-size 2",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--input", type=Path, required=True, metavar="DIR", help="exported model")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="RUN", help="new run directory, made whole"
    )
    parser.add_argument(
        "--world-size",
        type=int,
        default=1,
        metavar="P",
        help="ranks whose files are written; training may use any number",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Import, and say what has been written."""
    from ultramem_ds.exchange.importing import describe, import_model

    import_model(arguments.input, arguments.output, arguments.world_size)
    print(describe(arguments.output))
    return 0
