"""``evaluate``: a checkpoint's loss on prepared data, or its results on benchmark tasks."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

PRECISIONS = ("auto", "fp32", "bf16")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "evaluate",
        help="loss, perplexity, bits per byte of a checkpoint, per subset; or benchmark tasks",
        description="Evaluate a checkpoint of any world size on the device that is there, on the "
        "validation split of prepared data (--data) or on tasks of lm-evaluation-harness "
        "(--tasks). Under the launcher the ranks share value tables and experts.",
        epilog="Examples: ultramem-ds evaluate --checkpoint runs/mine --data runs/demo/data "
        "--max-sequences 64; ultramem-ds evaluate --checkpoint runs/mine --tasks paper --limit 100 "
        "--output runs/mine/tasks",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="PATH",
        help="a run directory (its latest checkpoint), one checkpoint under it, or an exported "
        "directory",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, metavar="DIR", help="directory written by `prepare`")
    what.add_argument(
        "--tasks",
        metavar="NAMES",
        help="`paper` (the ten benchmarks), or names of lm-evaluation-harness, or text files "
        "(.jsonl) for perplexity, separated by commas",
    )
    parser.add_argument(
        "--max-sequences", type=int, default=0, help="sequences per subset; 0 = all (--data)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per forward (--data)")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="of the weights")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    tasks = parser.add_argument_group("with --tasks")
    tasks.add_argument("--limit", type=int, help="items of each task; default all")
    tasks.add_argument(
        "--output", type=Path, metavar="DIR", help="write results.json and results.md there"
    )
    tasks.add_argument(
        "--task-data",
        type=Path,
        metavar="DIR",
        help="DIR/TASK/{train,validation,test,dev}.{jsonl,arrow,parquet} replaces downloads",
    )
    tasks.add_argument(
        "--max-length", type=int, help="tokens read at once; default the model's training length"
    )
    tasks.add_argument(
        "--window-overlap",
        type=int,
        default=0,
        help="tokens before each window of a perplexity task that are read again as its context",
    )
    tasks.add_argument(
        "--max-tokens", type=int, default=0, help="tokens of a forward; 0 = by the free memory"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate on data or on tasks."""
    if arguments.tasks is not None:
        from ultramem_ds.cli.evaluate_tasks import evaluate_tasks

        return evaluate_tasks(arguments)
    return _evaluate_data(arguments)


def _evaluate_data(arguments: argparse.Namespace) -> int:
    from ultramem_ds.data.micro_batch import Boundaries
    from ultramem_ds.data.same_tokenizer import require_same_tokenizer
    from ultramem_ds.infer.place import place
    from ultramem_ds.infer.source import open_source
    from ultramem_ds.train.evaluate import Reader, evaluate
    from ultramem_ds.utils.files import to_json

    if arguments.batch_size < 1 or arguments.max_sequences < 0:
        raise ValueError("--batch-size must be positive and --max-sequences not negative")
    source = open_source(arguments.checkpoint)
    vocab_size = require_same_tokenizer(source.tokenizer_dir, arguments.data).vocab_size
    with place() as here:
        model = here.load(source, arguments.precision)
        reader = Reader(device=here.device)
        if here.comm is not None:
            comm = here.comm
            reader = Reader(comm.rank, comm.world_size, here.device, comm.all_reduce_)
        losses = evaluate(
            lambda batch: model(*batch.model_inputs, vocab_limit=vocab_size)["loss"],
            arguments.data,
            source.config,
            micro_batch_size=arguments.batch_size,
            max_sequences=arguments.max_sequences,
            reader=reader,
        )
        is_main = here.is_main
    if not losses:
        num_tokens = source.config.model.seq_len + 1
        raise ValueError(
            f"{arguments.data} has no validation subset of at least {num_tokens} "
            "tokens; prepare with a larger --validation-share"
        )
    if not is_main:
        return 0
    if arguments.json:
        results = {n: {**asdict(r), "perplexity": r.perplexity} for n, r in losses.items()}
        print(to_json(results, indent=2))
        return 0
    print(f"{Boundaries.of(source.config.data).describe()}, as in training")
    print(f"{'subset':<24}{'loss':>10}{'perplexity':>14}{'bits/byte':>12}{'tokens':>14}")
    for name, r in losses.items():
        print(
            f"{name:<24}{r.loss:>10.4f}{r.perplexity:>14.2f}{r.bits_per_byte:>12.4f}{r.tokens:>14,}"
        )
    return 0
