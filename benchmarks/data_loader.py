"""The loader: throughput at 2048 tokens, share of a debug training step, 10^8 documents.

    python benchmarks/data_loader.py [--documents 100000000] [--data DIR] [--json]

The index of 10^8 documents is written for real (2 GB); its 100 GB of tokens are a sparse file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil

from ultramem_ds.data.indexed import bin_path, idx_path, write_index
from ultramem_ds.data.loader import BatchLoader
from ultramem_ds.data.manifest import Manifest, SubsetInfo, TokenizerInfo, load_manifest
from ultramem_ds.data.micro_batch import Boundaries
from ultramem_ds.data.mixture import Mixture

SEQ_LEN = 2048
VOCAB_SIZE = 50_277
DOCUMENT_TOKENS = 512
BLOCK = 1 << 20


class ConstantLengths:
    """Lengths of equal documents, in blocks."""

    def __init__(self, documents: int) -> None:
        self.documents = documents

    def __iter__(self) -> Iterator[np.ndarray]:
        for begin in range(0, self.documents, BLOCK):
            count = min(BLOCK, self.documents - begin)
            yield np.full(count, DOCUMENT_TOKENS, dtype=np.int32)


def write_subset(directory: Path, name: str, documents: int, *, sparse: bool) -> SubsetInfo:
    """One pair of ``documents`` equal documents; random ids, or a hole."""
    prefix = directory / name
    dtype = np.dtype(np.uint16)
    tokens = documents * DOCUMENT_TOKENS
    with open(bin_path(prefix), "wb") as out:
        if sparse:
            out.truncate(tokens * dtype.itemsize)
        else:
            random = np.random.default_rng(0)
            random.integers(0, VOCAB_SIZE, tokens, dtype=dtype).tofile(out)
    write_index(idx_path(prefix), dtype, documents, ConstantLengths(documents))
    return SubsetInfo(
        subset=name,
        split="train",
        documents=documents,
        tokens=tokens,
        text_bytes=0,
        dtype=str(dtype),
        sha256=hashlib.sha256(name.encode()).hexdigest(),
        tokenizer_hash="",
        eos_id=0,
        source_files=(),
        fingerprint="",
    )


def write_data(directory: Path, documents: dict[str, int], *, sparse: bool) -> None:
    """A prepared directory of equal documents."""
    directory.mkdir()
    Manifest(
        version=1,
        fingerprint="",
        tokenizer=TokenizerInfo(file="", hash="", vocab_size=VOCAB_SIZE, eos_id=0),
        validation_share=0.0,
        subsets=tuple(
            write_subset(directory, name, count, sparse=sparse) for name, count in documents.items()
        ),
        records=0,
        bad_records={},
        duplicates={},
    ).save(directory)


def open_mixture(directory: Path) -> Mixture:
    return Mixture(directory, "train", seq_len=SEQ_LEN, weights={}, seed=0)


def measure_throughput(directory: Path, seconds: float) -> list[dict[str, float]]:
    """Tokens per second through the loader, by number of workers and with the document mask."""
    rows = []
    for num_workers, document_mask in ((0, False), (1, False), (2, False), (1, True)):
        loader = BatchLoader(
            open_mixture(directory),
            global_batch_size=8,
            micro_batch_size=8,
            rank=0,
            world_size=1,
            num_workers=num_workers,
            boundaries=Boundaries(document_mask=document_mask),
        )
        batches = iter(loader)
        next(batches)
        begin, count = time.perf_counter(), 0
        while (elapsed_s := time.perf_counter() - begin) < seconds:
            next(batches)
            count += 8 * SEQ_LEN
        loader.close()
        rows.append(
            {
                "num_workers": num_workers,
                "document_mask": document_mask,
                "tokens_per_s": count / elapsed_s,
            }
        )
    return rows


def private_bytes() -> int:
    """Resident memory of this process that is not file pages."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


def measure_opening(directory: Path, sample: int) -> dict[str, float]:
    """Seconds to open, to the first sample, to sample ``sample``, and the next ones."""
    before = private_bytes()
    begin = time.perf_counter()
    mixture = open_mixture(directory)
    opened_s = time.perf_counter() - begin
    begin = time.perf_counter()
    mixture.sample(sample)
    resumed_s = time.perf_counter() - begin
    begin = time.perf_counter()
    for index in range(sample + 1, sample + 1001):
        mixture.sample(index)
    each_s = (time.perf_counter() - begin) / 1000
    begin = time.perf_counter()
    for index in range(sample + 1, sample + 1001):
        mixture.document_starts(index)
    starts_s = (time.perf_counter() - begin) / 1000
    return {
        "open_s": opened_s,
        "resume_s": resumed_s,
        "next_sample_us": each_s * 1e6,
        "document_starts_us": starts_s * 1e6,
        "more_memory_mib": (private_bytes() - before) / 2**20,
    }


def measure_step_share(directory: Path, run_dir: Path) -> dict[str, float]:
    """Time the training loop waits for its micro-batches, as a share of a debug step's time."""
    command = [sys.executable, "-m", "ultramem_ds", "train", "--preset", "ultramem-debug"]
    command += ["--data", str(directory), "--run-dir", str(run_dir), "train.max_steps=30"]
    command += [
        f"model.vocab_size={-(-load_manifest(directory).tokenizer.vocab_size // 128) * 128}"
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    step_s = float(np.median([json.loads(line)["step_time_s"] for line in lines[5:]]))
    config = json.loads((run_dir / "config.json").read_text())
    size, seq_len = config["train"]["global_batch_size"], config["model"]["seq_len"]
    waits = {}
    for num_workers in (0, 1):
        loader = BatchLoader(
            Mixture(directory, "train", seq_len=seq_len, weights={}, seed=0),
            global_batch_size=size,
            micro_batch_size=size,
            rank=0,
            world_size=1,
            num_workers=num_workers,
        )
        batches = iter(loader)
        next(batches)
        waited = []
        for _ in range(20):
            if num_workers:
                time.sleep(min(step_s, 0.2))  # the step, during which the worker prefetches
            begin = time.perf_counter()
            next(batches)
            waited.append(time.perf_counter() - begin)
        loader.close()
        waits[f"wait_share_{num_workers}_workers"] = float(np.median(waited)) / step_s
    return {"step_s": step_s, "tokens_per_step": size * seq_len, **waits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=10**8)
    parser.add_argument("--sample", type=int, default=10**8)
    parser.add_argument("--seconds", type=float, default=5.0, help="per throughput measurement")
    parser.add_argument("--data", help="a prepared directory for the training step's measurement")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        small, large = Path(name) / "small", Path(name) / "large"
        write_data(small, {"a": 100_000, "b": 50_000}, sparse=False)
        throughput = measure_throughput(small, arguments.seconds)
        begin = time.perf_counter()
        write_data(large, {"a": arguments.documents}, sparse=True)
        written_s = time.perf_counter() - begin
        opening = measure_opening(large, arguments.sample)
        step = (
            measure_step_share(Path(arguments.data), Path(name) / "run") if arguments.data else {}
        )
    result = {
        "config": {
            "seq_len": SEQ_LEN,
            "documents": arguments.documents,
            "sample": arguments.sample,
        },
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "load_average": os.getloadavg()[0],
        "throughput": throughput,
        "write_index_s": written_s,
        "opening": opening,
        "step": step,
    }
    print(json.dumps(result, indent=None if arguments.json else 1))


if __name__ == "__main__":
    main()
