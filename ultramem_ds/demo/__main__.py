"""``make demo``: corpus, tokenizer, data, three models on two ranks, one table.

Every stage is skipped when its result is there, and an interrupted training resumes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

from ultramem_ds.config.load import load_config
from ultramem_ds.demo.corpus import write_corpus
from ultramem_ds.model.accounting import count
from ultramem_ds.telemetry.report import Curves, markdown_table, plot_losses, read_run
from ultramem_ds.utils.files import write_json

ROOT = Path("runs/demo")
PRESETS = ("dense-debug", "moe-debug", "ultramem-debug")
NUM_RANKS = 2
OVERRIDES = ("train.max_steps=150", "train.eval_every=75", "train.save_every=75")
CHECKOUT = Path(__file__).resolve().parents[2]
LAUNCHER = CHECKOUT / "launch" / "one_node.sh"
STUDY = CHECKOUT / "docs" / "studies" / "tuned-demo.json"


def _run(command: list[str]) -> None:
    environment = {**os.environ, "NPROC": str(NUM_RANKS), "PYTHON": sys.executable}
    code = subprocess.run(command, env=environment).returncode
    if code:
        raise SystemExit(f"demo: {' '.join(command)} failed with exit code {code}")


def _stage(title: str) -> None:
    print(f"\n== {title}", flush=True)


def prepare_data() -> Path:
    """Corpus, tokenizer, tokenized data; returns the prepared directory."""
    corpus, tokenizer, data = ROOT / "corpus", ROOT / "tokenizer.json", ROOT / "data"
    if not (corpus / "docs" / "docs.jsonl").exists():
        _stage("writing a corpus: the Python standard library's sources and documentation")
        for subset, size in write_corpus(corpus).items():
            print(f"{subset}: {size / 1e6:.1f} MB of text")
    verb = [sys.executable, "-m", "ultramem_ds"]
    vocab_size = load_config("ultramem-debug").model.vocab_size
    if not tokenizer.exists():
        _stage(f"training a byte-level BPE tokenizer with {vocab_size} entries")
        _run(
            [*verb, "train-tokenizer", "--input", str(corpus), "--output", str(tokenizer)]
            + ["--vocab-size", str(vocab_size)]
        )
    _stage("tokenizing")
    _run(
        [*verb, "prepare", "--input", str(corpus), "--output", str(data)]
        + ["--tokenizer", str(tokenizer), "--workers", str(NUM_RANKS), "--validation-share", "0.02"]
    )
    return data


def unigram_entropy(data: Path, vocab_size: int) -> float:
    """Cross-entropy of the validation tokens under the training tokens' frequencies, nats."""
    import numpy as np

    from ultramem_ds.data.indexed import IndexedDataset

    counts = {}
    for split, directory in (("train", data), ("validation", data / "validation")):
        total = np.zeros(vocab_size, dtype=np.int64)
        for prefix in sorted(directory.glob("*.idx")):
            dataset = IndexedDataset(prefix.with_suffix(""))
            ids = dataset.tokens(0, dataset.num_tokens)
            total += np.bincount(ids, minlength=vocab_size)
        counts[split] = total
    model = (counts["train"] + 1) / (counts["train"] + 1).sum()
    return float(-(counts["validation"] * np.log(model)).sum() / counts["validation"].sum())


def summarise(presets: tuple[str, ...]) -> list[dict[str, Any]]:
    """One record per run, as in ``summary.json``."""
    records = []
    for name in presets:
        summary = json.loads((ROOT / name / "summary.json").read_text())
        counted = count(load_config(name, OVERRIDES))
        records.append(
            {
                "preset": name,
                "zero_stage": summary["zero_stage"],
                "world_size": summary["world_size"],
                "params": counted.params,
                "flops_per_token": counted.flops_per_token,
                "val_loss": summary["val_loss"],
                "tokens_per_s": summary["tokens_per_s"],
                "peak_memory_bytes": summary["peak_memory_bytes"],
            }
        )
    return records


def published_curves() -> tuple[str, Curves] | None:
    """Validation losses of the tuned presets on this corpus, means over seeds; None elsewhere."""
    if not STUDY.exists():
        return None
    by_kind: dict[str, list[list[list[float]]]] = {}
    for run in json.loads(STUDY.read_text())["runs"]:
        by_kind.setdefault(run["line"], []).append(run["validation"]["all"])
    curves = {
        kind: [(points[0][0], mean(loss for _, loss in points)) for points in zip(*seeds)]
        for kind, seeds in by_kind.items()
    }
    seeds = max(len(runs) for runs in by_kind.values())
    return f"tuned presets, validation loss, {seeds} seeds", curves


def main() -> None:
    """Run all stages and print the comparison; with ``--prepare-only`` stop at the data."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prepare-only", action="store_true", help="train nothing")
    begin = time.perf_counter()
    arguments = parser.parse_args()
    data = prepare_data()
    if arguments.prepare_only:
        return
    for name in PRESETS:
        _stage(f"training {name} on {NUM_RANKS} ranks")
        _run(
            ["bash", str(LAUNCHER), "train", "--preset", name, "--data", str(data)]
            + ["--run-dir", str(ROOT / name), *OVERRIDES]
        )
    records = summarise(PRESETS)
    write_json(ROOT / "summary.json", records)
    longer = published_curves()
    runs = [read_run(ROOT / name) for name in PRESETS]
    plot_losses(runs, ROOT / "losses.png", beside=longer)
    entropy = unigram_entropy(data, load_config("ultramem-debug").model.vocab_size)
    _stage("result")
    train = load_config("ultramem-debug", OVERRIDES).train
    seen = train.max_steps * train.global_batch_size * load_config("ultramem-debug").model.seq_len
    header = ["preset", "ZeRO", "ranks", "parameters", "FLOPs/token", "tokens", "val. loss"]
    rows = [
        [
            r["preset"],
            str(r["zero_stage"]),
            str(r["world_size"]),
            f"{r['params'] / 1e6:.2f} M",
            f"{r['flops_per_token'] / 1e6:.2f} M",
            f"{seen / 1e6:.2f} M",
            f"{r['val_loss']:.4f}",
            f"{r['tokens_per_s']:,.0f}",
            f"{r['peak_memory_bytes'] / 2**20:,.0f} MiB",
        ]
        for r in records
    ]
    print(markdown_table([*header, "tokens/s", "peak memory/rank"], rows))
    print(
        f"unigram entropy of the validation text: {entropy:.4f} nats per token "
        f"(a uniform guess: {math.log(load_config('ultramem-debug').model.vocab_size):.4f})"
    )
    print(
        f"One seed, {seen / 1e6:.2f} M tokens, plain presets: the ordering at this length is not "
        "the ordering later. docs/study.md says what longer runs give, and which settings suit "
        "each kind."
    )
    if longer is not None:
        tokens = max(points[-1][0] for points in longer[1].values())
        ends = ", ".join(f"{kind} {points[-1][1]:.2f}" for kind, points in longer[1].items())
        print(f"{longer[0]}, after {tokens / 1e6:.2f} M tokens of this corpus: {ends}")
    print(f"summary: {ROOT / 'summary.json'}   curves: {ROOT / 'losses.png'}")
    print(f"TensorBoard: make tensorboard LOGDIR={ROOT}")
    print(f"took {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
