"""Tokens per second of `generate`: this program, transformers and vLLM, one table.

    python benchmarks/generate_speed.py [--batches 1 8 32] [--new-tokens 64] [--dtype bf16]
        [--small] [--layers 5] [--clock cpu]

Dense, MoE and UltraMem at the 151M-layer shape, random weights, greedy, no end of text. Each
(model, backend) pair is a process of its own in its own environment, one after the other, driven
through what users call: `infer.generate`, `AutoModelForCausalLM.generate`, `vllm.LLM.generate`. A
time holds prefill and decoding; loading and one warm-up call are outside. The best of --rounds.

--small cuts the tables to 320^2 rows and the experts to 8, for machines of 8 GB: what a token
computes stays, what the caches of the CPU can hold does not. --layers keeps the first blocks and
the memory layers that end among them (5: one of the three). --clock cpu counts CPU seconds of all
threads, for machines that others work on; wall seconds are the default.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ultramem_ds.model.lm import LanguageModel
    from ultramem_ds.sharding.blocks import Block

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MODELS = {
    "dense": ("dense-151m", []),
    "moe": ("moe-151m-2in32", ["moe.num_experts=8"]),
    "ultramem": ("ultramem-151m-x12", ["memory.knum=320"]),
}
BACKENDS = ("ours", "transformers", "vllm")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
RUN, EXPORT = "run", "export"

Generate = Callable[[list[list[int]], int], object]  # prompts and new tokens of each


class FreshWeights:
    """Weights of a model that nobody trained, as ``write_run`` reads them."""

    def __init__(self, model: LanguageModel) -> None:
        self._parameters = dict(model.named_parameters())
        self._buffers = dict(model.named_buffers())

    def read(self, name: str, block: Block, out_RC: Tensor) -> None:
        values_RC = self._parameters[name].detach().view(-1, block.num_columns)
        out_RC.copy_(values_RC[block.first_row : block.first_row + block.num_rows])

    def buffers(self) -> dict[str, Tensor]:
        return self._buffers


def overrides(model: str, small: bool, layers: int | None) -> list[str]:
    """What --small and --layers make of a preset."""
    from ultramem_ds.config.load import load_config

    preset, cuts = MODELS[model]
    words = [*cuts] if small else []
    if layers is not None:
        words.append(f"model.num_layers={layers}")
        if model == "ultramem":
            spans = load_config(preset, []).memory.spans
            kept = [f"{begin}:{end}" for begin, end in spans if end <= layers]
            words.append(f"memory.placement={'/'.join(kept)}")
    return words


def write_model(name: str, words: list[str], dtype: str, directory: Path) -> None:
    """A run directory and its export under ``directory``."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    from ultramem_ds.config.load import load_config
    from ultramem_ds.data.tokenizers import HuggingFaceTokenizer
    from ultramem_ds.exchange.directory import export_hf
    from ultramem_ds.exchange.importing import Source, write_run
    from ultramem_ds.model.init import init_module
    from ultramem_ds.model.lm import LanguageModel

    config = load_config(MODELS[name][0], words)
    model = LanguageModel(config)
    init_module(model, config, seed=0)
    with torch.no_grad():
        model.eval().logits(torch.zeros((1, 1), dtype=torch.int64))  # singular vectors of the cores
    vocabulary = {"<|endoftext|>": 0, **{f"w{i}": i for i in range(1, config.model.vocab_size)}}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<|endoftext|>"))
    backend.add_special_tokens(["<|endoftext|>"])
    tokenizer = HuggingFaceTokenizer(backend.to_str().encode())
    write_run(Source(config, FreshWeights(model), tokenizer), directory / RUN, world_size=1)
    export_hf(directory / RUN, directory / EXPORT, dtype, 4 << 30)


def load_ours(directory: Path, dtype: str, most: int) -> Generate:
    from ultramem_ds.infer.generate import generate
    from ultramem_ds.infer.load import load_model
    from ultramem_ds.infer.prepare import prepare_for_decoding
    from ultramem_ds.infer.sampling import Sampling

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = prepare_for_decoding(load_model(directory / RUN, device, DTYPES[dtype]))
    last = model.config.model.vocab_size - 1  # as the end of text, which is then never chosen
    return lambda prompts, count: generate(
        model,
        prompts,
        Sampling(max_new_tokens=count, temperature=0.0),
        eos_id=last,
        vocab_size=last,
    )


def load_transformers(directory: Path, dtype: str, most: int) -> Generate:
    from transformers import AutoModelForCausalLM

    import ultramem_ds.hf  # noqa: F401 - registers the model family

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(directory / EXPORT, dtype=DTYPES[dtype])
    model = model.to(device).eval()
    return lambda prompts, count: model.generate(
        torch.tensor(prompts, device=device),
        attention_mask=torch.ones(len(prompts), len(prompts[0]), dtype=torch.long, device=device),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
    )


def load_vllm(directory: Path, dtype: str, most: int) -> Generate:
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(directory / EXPORT),
        dtype={"fp32": "float32", "bf16": "bfloat16"}[dtype],
        skip_tokenizer_init=True,
        max_num_seqs=most,
        kv_cache_memory_bytes=2 << 30,
        enable_prefix_caching=False,
    )

    def generate(prompts: list[list[int]], count: int) -> object:
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        return llm.generate(inputs, params, use_tqdm=False)

    return generate


LOADERS = {"ours": load_ours, "transformers": load_transformers, "vllm": load_vllm}


def measure(arguments: argparse.Namespace) -> None:
    """One (model, backend) pair: prints a JSON line per batch size."""
    torch.manual_seed(0)
    clock = CLOCKS[arguments.clock]
    with torch.no_grad():
        generate = LOADERS[arguments.backend](
            arguments.directory, arguments.dtype, max(arguments.batches)
        )
        for batch in arguments.batches:
            prompts = torch.randint(1, 1000, (batch, arguments.prompt_tokens)).tolist()
            generate(prompts, 2)
            times = []
            for _ in range(arguments.rounds):
                begin = clock()
                generate(prompts, arguments.new_tokens)
                times.append(clock() - begin)
            speed = batch * arguments.new_tokens / min(times)
            print(json.dumps({"batch": batch, "tokens_per_s": speed}), flush=True)


def run_pair(arguments: argparse.Namespace, backend: str, directory: Path) -> dict[int, float]:
    """Tokens per second by batch size, measured in the backend's environment."""
    python = {
        "ours": arguments.python,
        "transformers": arguments.python_transformers,
        "vllm": arguments.python_vllm,
    }[backend]
    command = [
        python, __file__, "--backend", backend, "--directory", str(directory),
        "--dtype", arguments.dtype, "--rounds", str(arguments.rounds),
        "--new-tokens", str(arguments.new_tokens),
        "--prompt-tokens", str(arguments.prompt_tokens), "--clock", arguments.clock,
        "--batches", *map(str, arguments.batches),
    ]  # fmt: skip
    # The other interpreter finds this program's source; vLLM's engine counts as this process.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"batch"')]
    return {line["batch"]: line["tokens_per_s"] for line in lines}


def heading(arguments: argparse.Namespace) -> str:
    """What the table shows, and where."""
    cuts = ["small"] if arguments.small else []
    cuts += [f"{arguments.layers} layers"] if arguments.layers else []
    return (
        f"tokens per {'CPU ' if arguments.clock == 'cpu' else ''}second, "
        f"{', '.join([arguments.dtype, *cuts])}, {arguments.prompt_tokens} prompt and "
        f"{arguments.new_tokens} new tokens, best of {arguments.rounds}, "
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}\n"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--layers", type=int, help="blocks; the preset's own 12")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--python", default=sys.executable, help="with this program")
    parser.add_argument("--python-transformers", default=sys.executable)
    parser.add_argument("--python-vllm", default=str(ROOT / ".venv-vllm/bin/python"))
    parser.add_argument("--scratch", type=Path, help="where models are written; a new directory")
    parser.add_argument("--backend", choices=BACKENDS, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.backend:
        measure(arguments)
        return
    print(heading(arguments))
    print("| model | backend | " + " | ".join(f"batch {b}" for b in arguments.batches) + " |")
    print("|---|---|" + "---|" * len(arguments.batches))
    for model in arguments.models:
        words = overrides(model, arguments.small, arguments.layers)
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            write_model(model, words, arguments.dtype, Path(scratch))
            for backend in arguments.backends:
                speeds = run_pair(arguments, backend, Path(scratch))
                cells = " | ".join(f"{speeds[batch]:,.1f}" for batch in arguments.batches)
                print(f"| {model} | {backend} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
