"""`prepare` against the bare tokenizer library, and its memory as the input grows.

    python benchmarks/data_prepare.py --tokenizer tokenizer.json [--mb 30] [--rounds 3] [--json]

Throughput: rounds of (encode_batch of all texts in memory, `prepare` of the same texts from files,
from the start of the process to the finished directory), alternating because machines are shared.
Memory: peak resident size of the process tree for a third of the text and for ten times that.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

# Read by the library at its first use.
BARE = """
import json, os, sys, time
from tokenizers import Tokenizer
backend = Tokenizer.from_file(sys.argv[1])
backend.encode_special_tokens = True
texts = [json.loads(line)["text"] for path in sys.argv[2:] for line in open(path)]
begin, cpu, tokens = time.perf_counter(), time.process_time(), 0
for first in range(0, len(texts), 1024):
    batch = backend.encode_batch(texts[first : first + 1024], add_special_tokens=False)
    tokens += sum(map(len, batch))
print(json.dumps([time.perf_counter() - begin, time.process_time() - cpu, tokens]))
"""


def write_corpus(directory: Path, num_bytes: int, files: int = 8) -> int:
    """The standard library's sources in pieces, made distinct; returns bytes of text."""
    root = Path(os.__file__).parent
    texts = [path.read_text(errors="ignore") for path in sorted(root.glob("*.py"))]
    directory.mkdir(parents=True)
    written = number = 0
    for part in range(files):
        with open(directory / f"part-{part}.jsonl", "w") as out:
            while written < num_bytes * (part + 1) // files:
                source = texts[number % len(texts)]
                begin = number * 997 % max(1, len(source) - 6000)
                text = f"{number}\n{source[begin : begin + 6000]}"
                out.write(json.dumps({"text": text}) + "\n")
                written += len(text.encode())
                number += 1
    return written


def run_bare(tokenizer: str, directory: Path, cores: int) -> tuple[float, float, int]:
    """(seconds, processor seconds, tokens) of encode_batch alone."""
    files = sorted(map(str, directory.glob("*.jsonl")))
    environment = {
        **os.environ,
        "RAYON_NUM_THREADS": str(cores),
        "TOKENIZERS_PARALLELISM": "true" if cores > 1 else "false",
    }
    command = [sys.executable, "-c", BARE, tokenizer, *files]
    elapsed_s, cpu_s, tokens = json.loads(subprocess.check_output(command, env=environment))
    return elapsed_s, cpu_s, tokens


def run_prepare(
    tokenizer: str, directory: Path, workers: int, *, trace_memory: bool = False
) -> tuple[float, float, int]:
    """(seconds, processor seconds, peak bytes of the process tree) of the whole command."""
    output = directory.with_name("out")
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "ultramem_ds", "prepare", "--input", str(directory)]
    command += ["--output", str(output), "--tokenizer", tokenizer, "--workers", str(workers)]
    before = os.times()
    begin = time.perf_counter()
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while trace_memory and process.poll() is None:
        peak = max(peak, _resident_bytes(process))
        time.sleep(0.02)
    assert process.wait() == 0, command
    elapsed_s = time.perf_counter() - begin
    after = os.times()
    cpu_s = after.children_user + after.children_system - before.children_user
    return elapsed_s, cpu_s - before.children_system, peak


def _resident_bytes(process: psutil.Process) -> int:
    """Resident bytes that are not file pages, of a process and its children."""
    total = 0
    try:
        for member in [process, *process.children(recursive=True)]:
            memory = member.memory_info()
            total += memory.rss - memory.shared
    except psutil.NoSuchProcess:
        return total
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--mb", type=float, default=30.0, help="text of the small corpus")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        corpus = Path(name) / "corpus"
        num_bytes = write_corpus(corpus, int(arguments.mb * 1e6))
        rounds = []
        for _ in range(arguments.rounds):
            bare_s, bare_cpu_s, tokens = run_bare(arguments.tokenizer, corpus, arguments.workers)
            prepare_s, prepare_cpu_s, _ = run_prepare(
                arguments.tokenizer, corpus, arguments.workers
            )
            rounds.append(
                {
                    "bare_mb_per_s": num_bytes / bare_s / 1e6,
                    "prepare_mb_per_s": num_bytes / prepare_s / 1e6,
                    "bare_tokens_per_s": tokens / bare_s,
                    "ratio": bare_s / prepare_s,
                    "ratio_of_cpu_time": bare_cpu_s / prepare_cpu_s,
                }
            )
        memory = []
        for factor in () if arguments.skip_memory else (1, 10):
            large = Path(name) / f"corpus-{factor}" / "in"
            size = write_corpus(large, factor * int(arguments.mb * 1e6) // 3)
            _, _, peak = run_prepare(
                arguments.tokenizer, large, arguments.workers, trace_memory=True
            )
            memory.append({"text_mb": size / 1e6, "peak_mib": peak / 2**20})
        result = {
            "config": {"workers": arguments.workers, "text_mb": num_bytes / 1e6},
            "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "load_average": os.getloadavg()[0],
            "rounds": rounds,
            "median_ratio": statistics.median(row["ratio"] for row in rounds),
            "median_ratio_of_cpu_time": statistics.median(
                row["ratio_of_cpu_time"] for row in rounds
            ),
            "memory": memory,
        }
    print(json.dumps(result, indent=None if arguments.json else 1))


if __name__ == "__main__":
    main()
