"""``export``: a checkpoint in other programs' formats."""

from __future__ import annotations

import argparse
from pathlib import Path

FORMATS = ("hf", "safetensors", "deepspeed")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "export",
        help="write a checkpoint for transformers, as safetensors, or for DeepSpeed's tools",
        description="Export a checkpoint of any world size, partition scheme, ZeRO stage and "
        "offload. hf: a directory for transformers (docs/export.md); safetensors: the one-process "
        "model's state dict; deepspeed: a run directory that DeepSpeed's own tools read.",
        epilog="Example: ultramem-ds export --checkpoint runs/mine --output mine-hf --dtype bf16",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="PATH",
        help="a run directory (its latest checkpoint) or one checkpoint under it",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="new directory, made whole"
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="of floating-point weights"
    )
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="hf: largest file")
    parser.add_argument("--format", choices=FORMATS, default="hf")
    parser.add_argument(
        "--world-size", type=int, default=1, metavar="P", help="deepspeed: ranks of the layout"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Export, and say what has been written."""
    from ultramem_ds.exchange.directory import export_hf, export_plain
    from ultramem_ds.exchange.shards import parse_size

    if arguments.format == "deepspeed":
        if arguments.dtype != "fp32":
            raise ValueError("--format deepspeed keeps the fp32 masters; leave --dtype fp32")
        from ultramem_ds.zero.default_layout import write_default_layout

        print(write_default_layout(arguments.checkpoint, arguments.output, arguments.world_size))
        return 0
    if arguments.format == "safetensors":
        exported = export_plain(arguments.checkpoint, arguments.output, arguments.dtype)
    else:
        max_bytes = parse_size(arguments.max_shard_size)
        exported = export_hf(arguments.checkpoint, arguments.output, arguments.dtype, max_bytes)
    files, size = len(exported.files), exported.num_bytes / 1e6
    print(f"{exported.directory}: {files} files, {size:,.1f} MB, weights in {arguments.dtype}")
    return 0
