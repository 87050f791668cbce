"""How often natural text repeats rows: what de-duplication saves, of an initial or a trained model.

    python benchmarks/natural_rows.py --data runs/demo/data [--checkpoint RUN] [section.key=value]

Per memory layer: of the rows that one rank looks up in one step (T tokens, K rows each), how many
are distinct; number-wise de-duplication sends as many times fewer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ultramem_ds.config.load import load_config
from ultramem_ds.data.loader import BatchLoader
from ultramem_ds.data.micro_batch import MicroBatch
from ultramem_ds.data.mixture import Mixture
from ultramem_ds.data.units import Split
from ultramem_ds.infer.load import load_model
from ultramem_ds.model.init import init_module
from ultramem_ds.model.lm import LanguageModel


def whole_batches(data: Path, split: Split, seq_len: int, sequences: int) -> Iterator[MicroBatch]:
    """Batches of so many sequences, in one process."""
    loader = BatchLoader(
        Mixture(data, split, seq_len=seq_len, weights={}, seed=0),
        global_batch_size=sequences,
        micro_batch_size=sequences,
        rank=0,
        world_size=1,
        num_workers=0,
    )
    try:
        yield from loader
    finally:
        loader.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="prepared data, as of make demo")
    parser.add_argument("--checkpoint", type=Path, help="a trained run; otherwise initial values")
    parser.add_argument("--preset", default="ultramem-debug")
    parser.add_argument("--tokens", type=int, default=2048, help="T, per rank and step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("overrides", nargs="*", help="section.key=value, of an initial model")
    args = parser.parse_args()
    if args.checkpoint:
        model: Any = load_model(args.checkpoint)
    else:
        config = load_config(args.preset, args.overrides)
        model = LanguageModel(config)
        init_module(model, config, config.train.seed)
    model.eval()
    config = model.config
    shares: list[list[float]] = [[] for _ in model.memory_layers]
    for index, memory in enumerate(model.memory_layers):
        start = memory.lookup.start

        def count(rows_TK: Any, *rest: Any, start: Any = start, index: int = index) -> Any:
            shares[index].append(rows_TK.unique().numel() / rows_TK.numel())
            return start(rows_TK, *rest)

        memory.lookup.start = count
    sequences = args.tokens // config.model.seq_len
    batches = whole_batches(args.data, "train", config.model.seq_len, sequences)
    with torch.no_grad():
        for _ in range(args.steps):
            batch = next(batches)
            model(batch.tokens, batch.doc_ids, batch.positions)
    memory = config.memory
    shape = f"{sequences} x {config.model.seq_len} tokens, K {memory.rows_per_token}"
    print(f"{shape}, N {memory.num_rows:,}")
    for index, found in enumerate(shares):
        mean = sum(found) / len(found)
        entries = sequences * config.model.seq_len * memory.rows_per_token
        uniform = memory.num_rows * (1 - (1 - 1 / memory.num_rows) ** entries) / entries
        print(
            f"layer {index}: {mean:.3f} of the rows asked for are distinct "
            f"({1 / mean:.2f} times fewer to send); uniform ids: {uniform:.3f}"
        )


if __name__ == "__main__":
    main()
