"""``evaluate``: validation loss, perplexity and bits per byte of a checkpoint."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "evaluate",
        help="loss, perplexity, bits per byte of a checkpoint, per subset",
        description="Evaluate a checkpoint of any world size on one process, on the validation "
        "split of prepared data.",
        epilog="Example: ultramem-ds evaluate --checkpoint runs/mine --data runs/demo/data "
        "--max-sequences 64",
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
        "--data", type=Path, required=True, metavar="DIR", help="directory written by `prepare`"
    )
    parser.add_argument(
        "--max-sequences", type=int, default=0, help="sequences per subset; 0 = all"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per forward")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Load the checkpoint on one process and evaluate it."""
    from ultramem_ds.checkpoint.directory import find_checkpoint, read_trainer_state, run_dir_of
    from ultramem_ds.config.load import from_dict
    from ultramem_ds.data.micro_batch import Boundaries
    from ultramem_ds.data.same_tokenizer import require_same_tokenizer
    from ultramem_ds.infer.load import load_model
    from ultramem_ds.train.evaluate import evaluate
    from ultramem_ds.utils.files import to_json

    if arguments.batch_size < 1 or arguments.max_sequences < 0:
        raise ValueError("--batch-size must be positive and --max-sequences not negative")
    run_dir = run_dir_of(arguments.checkpoint)
    vocab_size = require_same_tokenizer(run_dir, arguments.data).vocab_size
    model = load_model(arguments.checkpoint)
    config = from_dict(read_trainer_state(find_checkpoint(arguments.checkpoint)).config)
    losses = evaluate(
        lambda batch: model(*batch.model_inputs, vocab_limit=vocab_size)["loss"],
        arguments.data,
        config,
        micro_batch_size=arguments.batch_size,
        max_sequences=arguments.max_sequences,
    )
    if not losses:
        raise ValueError(
            f"{arguments.data} has no validation subset of at least {config.model.seq_len + 1} "
            "tokens; prepare with a larger --validation-share"
        )
    if arguments.json:
        results = {n: {**asdict(r), "perplexity": r.perplexity} for n, r in losses.items()}
        print(to_json(results, indent=2))
        return 0
    print(f"{Boundaries.of(config.data).describe()}, as in training")
    print(f"{'subset':<24}{'loss':>10}{'perplexity':>14}{'bits/byte':>12}{'tokens':>14}")
    for name, r in losses.items():
        print(
            f"{name:<24}{r.loss:>10.4f}{r.perplexity:>14.2f}{r.bits_per_byte:>12.4f}{r.tokens:>14,}"
        )
    return 0
