"""``generate``: text from a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ultramem_ds.infer.precision import PRECISIONS


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "generate",
        help="continue prompts",
        description="Continue prompts with a checkpoint of any world size, on the device that is "
        "there. Under the launcher the ranks share value tables, experts and prompts.",
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
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="of the weights")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Load, decode, and print: one prompt as it comes, several when all are done."""
    from ultramem_ds.data.tokenizers import load_tokenizer
    from ultramem_ds.infer.generate import generate, stream
    from ultramem_ds.infer.place import place
    from ultramem_ds.infer.prepare import prepare_for_decoding
    from ultramem_ds.infer.sampling import Sampling
    from ultramem_ds.infer.source import open_source
    from ultramem_ds.infer.text import Detokenizer

    sampling = Sampling(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    source = open_source(arguments.checkpoint)
    tokenizer = load_tokenizer(source.tokenizer_dir)
    prompts = [tokenizer.encode(text) or [tokenizer.eos_id] for text in arguments.prompt]
    limits: dict[str, Any] = {"eos_id": tokenizer.eos_id, "vocab_size": tokenizer.vocab_size}
    with place() as here:
        model = prepare_for_decoding(here.load(source, arguments.precision))
        if len(prompts) == 1:
            mine = prompts if here.is_main else []
            if here.is_main:
                print(arguments.prompt[0], end="", flush=True)
            text = Detokenizer(tokenizer, prompts[0])
            for new in stream(model, mine, sampling, **limits, peers=here.peers):
                print(text.push(new.token), end="", flush=True)
            if here.is_main:
                print(text.rest())
            return 0
        # Prompt i on rank i mod P; a rank without a prompt keeps the others company.
        ranks = here.peers.world_size
        mine = prompts[here.peers.rank :: ranks]
        parts = here.peers.gather_objects(
            generate(model, mine, sampling, **limits, peers=here.peers)
        )
        if here.is_main:
            for index, prompt in enumerate(arguments.prompt):
                ids = parts[index % ranks][index // ranks]
                text = Detokenizer(tokenizer, prompts[index])
                print(f"{prompt}{text.all(ids)}\n")
    return 0
