"""``generate``: text from a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "generate",
        help="continue a prompt",
        description="Continue a prompt with a checkpoint of any world size, on one process.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="PATH",
        help="a run directory (its latest checkpoint) or one checkpoint under it",
    )
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=1.0, help="0 = greedy")
    parser.add_argument("--top-k", type=int, default=0, help="0 = all")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus mass; 1 = all")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Load, decode, and print text as it comes."""
    from ultramem_ds.data.tokenizers import load_tokenizer
    from ultramem_ds.infer.generate import Sampling, stream
    from ultramem_ds.infer.load import load_model
    from ultramem_ds.train.checkpoint import run_dir_of

    sampling = Sampling(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    tokenizer = load_tokenizer(run_dir_of(arguments.checkpoint))
    model = load_model(arguments.checkpoint)
    prompt = tokenizer.encode(arguments.prompt)
    ids: list[int] = []
    shown = ""
    print(arguments.prompt, end="", flush=True)
    for token in stream(
        model, prompt or [tokenizer.eos_id], sampling, tokenizer.eos_id, tokenizer.vocab_size
    ):
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # an incomplete UTF-8 sequence waits for its next token
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()
    return 0
