"""Peak memory of what reads a model that is nearly all value table, command by command.

The commands that users run, each in its own process, watched from outside: anonymous memory (what
the process holds) apart from mapped pages of files (which the kernel takes back when it needs to).
The same commands with a tiny table show what the program itself takes.

Usage: nice python benchmarks/export_memory.py [--knum 1024] [--directory DIR] [--json]
    [--only evaluate generate]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ultramem_ds.config.load import load_config
from ultramem_ds.exchange.importing import Source, write_run
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.sharding.blocks import Block

VALUE_DIM = 1024
COMMANDS = ("exchange", "evaluate", "generate")
TOKENIZER = """{"version": "1.0", "added_tokens": [{"id": 0, "content": "<|endoftext|>",
 "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
 "pre_tokenizer": {"type": "Whitespace"}, "model": {"type": "WordLevel",
 "vocab": {"<|endoftext|>": 0, "<unk>": 1}, "unk_token": "<unk>"}}"""
LOAD = """
import sys, torch, ultramem_ds.hf
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
with torch.no_grad():
    model(torch.zeros(1, 4, dtype=torch.int64))
"""


class SomeWeights:
    """Numbers for a run that nobody has trained, a chunk at a time."""

    def __init__(self, model: LanguageModel) -> None:
        self._buffers = {name: torch.zeros(b.shape) for name, b in model.named_buffers()}

    def read(self, name: str, block: Block, out_RC: Tensor) -> None:
        """Fill a block."""
        del name, block
        out_RC.normal_(0.0, 0.02)

    def buffers(self) -> dict[str, Tensor]:
        """Zeros: singular vectors never computed."""
        return self._buffers


def make_run(directory: Path, knum: int) -> Path:
    """A run directory of one memory layer with knum^2 rows."""
    overrides = [f"memory.knum={knum}", f"memory.value_dim={VALUE_DIM}", "memory.placement=1:2"]
    config = load_config("ultramem-debug", overrides)
    with torch.device("meta"):
        model = LanguageModel(config)
    write_run(Source(config, SomeWeights(model), None), directory, 1)
    (directory / "tokenizer.json").write_text(TOKENIZER)
    return directory


def peak_of(command: list[str]) -> dict[str, float]:
    """Run a command; peaks of its anonymous and its mapped memory in MB, and its seconds."""
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    peaks = {"RssAnon": 0, "RssFile": 0}
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        for line in status.splitlines():
            name, _, value = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], int(value.split()[0]))
        time.sleep(0.05)
    if process.wait():
        raise SystemExit(f"{' '.join(command)} failed")
    seconds = round(time.perf_counter() - begin, 1)
    print(" ".join(command)[:60], peaks, f"{seconds} s", file=sys.stderr, flush=True)
    return {"anonymous_mb": peaks["RssAnon"] / 1e3, "mapped_mb": peaks["RssFile"] / 1e3,
            "time_s": seconds}  # fmt: skip


def make_data(run: Path, directory: Path) -> Path:
    """Prepared data in the tokens of ``run``."""
    text = directory.with_suffix(".jsonl")
    text.write_text((json.dumps({"text": "a b " * 2000}) + "\n") * 8)
    words = ["--tokenizer", str(run / "tokenizer.json"), "--validation-share", "0.5"]
    command = ["prepare", "--input", str(text), "--output", str(directory), *words]
    subprocess.run([sys.executable, "-m", "ultramem_ds", *command], check=True, capture_output=True)
    return directory


def reading(run: Path, root: Path, only: Sequence[str]) -> dict[str, dict[str, float]]:
    """The commands that compute with a checkpoint."""
    found = {}
    from_run = ["--checkpoint", str(run), "--precision"]
    if "evaluate" in only:
        words = ["--data", str(make_data(run, root / "data")), "--max-sequences", "2"]
        for dtype in ("fp32", "bf16"):
            command = ["-m", "ultramem_ds", "evaluate", *from_run, dtype, *words]
            found[f"evaluate {dtype}"] = peak_of(command)
    if "generate" in only:
        words = ["--prompt", "a", "--max-new-tokens", "4"]
        for dtype in ("fp32", "bf16"):
            command = ["-m", "ultramem_ds", "generate", *from_run, dtype, *words]
            found[f"generate {dtype}"] = peak_of(command)
    return found


def measure(root: Path, knum: int, only: Sequence[str]) -> dict[str, dict[str, float]]:
    """The chosen commands on one model."""
    run = make_run(root / "run", knum)
    found = exchanging(run, root) if "exchange" in only else {}
    return found | reading(run, root, only)


def exchanging(run: Path, root: Path) -> dict[str, dict[str, float]]:
    """Export, import and the load in transformers."""
    verb = ["-m", "ultramem_ds"]
    export = [*verb, "export", "--checkpoint", str(run)]
    found = {
        "export fp32": peak_of([*export, "--output", str(root / "fp32")]),
        "import": peak_of([*verb, "import", "--input", str(root / "fp32"),
                           "--output", str(root / "back")]),
    }  # fmt: skip
    shutil.rmtree(root / "back")
    found["from_pretrained fp32"] = peak_of(["-c", LOAD, str(root / "fp32"), "float32"])
    shutil.rmtree(root / "fp32")
    parts = ["--output", str(root / "parts"), "--max-shard-size", "1GB", "--dtype", "bf16"]
    found["export bf16, 1 GB shards"] = peak_of([*export, *parts])
    found["from_pretrained bf16, parts"] = peak_of(["-c", LOAD, str(root / "parts"), "bfloat16"])
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--knum", type=int, default=1024, help="the table has knum^2 rows of 4 KB")
    parser.add_argument("--directory", type=Path, help="where to write; 4 tables' worth of disk")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results = {}
    for name, knum in (("large", arguments.knum), ("tiny", 16)):
        with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
            results[name] = measure(Path(scratch), knum, arguments.only)
    table_mb = arguments.knum**2 * VALUE_DIM * 4 / 1e6
    if arguments.json:
        print(json.dumps({"table_mb": table_mb, **results}, indent=1))
        return
    print(f"table {table_mb:,.0f} MB in fp32; peak MB: anonymous, of it for a tiny table; mapped")
    for command, large in results["large"].items():
        tiny = results["tiny"][command]["anonymous_mb"]
        print(f"{command:<30}{large['anonymous_mb']:>10,.0f}{tiny:>10,.0f}"
              f"{large['mapped_mb']:>10,.0f}{large['time_s']:>9.1f} s")  # fmt: skip


if __name__ == "__main__":
    main()
