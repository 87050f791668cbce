"""``generate``: text from a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

DTYPES = ("fp32", "bf16")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "generate",
        help="continue prompts",
        description="Continue prompts with a checkpoint of any world size, on one process.",
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
        "--prompt",
        required=True,
        action="append",
        metavar="TEXT",
        help="text to continue; given several times, all are decoded together as one batch",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=1.0, help="0 = greedy")
    parser.add_argument("--top-k", type=int, default=0, help="0 = all")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus mass; 1 = all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=DTYPES, default="fp32", help="of the weights")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Load, decode, and print: one prompt as it comes, several when all are done."""
    import torch

    from ultramem_ds.checkpoint.directory import run_dir_of
    from ultramem_ds.data.tokenizers import load_tokenizer
    from ultramem_ds.infer.generate import generate, stream
    from ultramem_ds.infer.load import load_model
    from ultramem_ds.infer.prepare import prepare_for_decoding
    from ultramem_ds.infer.sampling import Sampling
    from ultramem_ds.infer.text import Detokenizer

    sampling = Sampling(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    tokenizer = load_tokenizer(run_dir_of(arguments.checkpoint))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    model = prepare_for_decoding(load_model(arguments.checkpoint, device, dtype))
    prompts = [tokenizer.encode(text) or [tokenizer.eos_id] for text in arguments.prompt]
    limits = {"eos_id": tokenizer.eos_id, "vocab_size": tokenizer.vocab_size}
    if len(prompts) == 1:
        print(arguments.prompt[0], end="", flush=True)
        text = Detokenizer(tokenizer, prompts[0])
        for new in stream(model, prompts, sampling, **limits):
            print(text.push(new.token), end="", flush=True)
        print(text.rest())
        return 0
    continuations = generate(model, prompts, sampling, **limits)
    for prompt, ids, new_ids in zip(arguments.prompt, prompts, continuations):
        print(f"{prompt}{Detokenizer(tokenizer, ids).all(new_ids)}\n")
    return 0
