"""Time of a training step as the table grows at fixed tokens: dense Adam against row-sparse.

    python benchmarks/table_growth.py [--knums 362 724 1448] [--rounds 8] [--json]

One process, one memory layer; the sizes of one optimizer take turns step by step. A step is split
by who spends it:

- *table*: the lookup forward and backward, publishing the gradient, and the table's optimizer
  (under dense Adam the whole of ZeRO-3's step, in which the table dominates);
- *retrieval*: forward and backward of queries, keys and selection, called on their own: the keys
  grow with the square root of the rows;
- *step*: all of it.

T tokens, K rows per token, N rows, V value width.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ultramem_ds.bench.common import Timing, header
from ultramem_ds.config.deepspeed import load_deepspeed_json
from ultramem_ds.config.load import load_config
from ultramem_ds.config.schema import Config
from ultramem_ds.data.micro_batch import MicroBatch
from ultramem_ds.model.init import init_module
from ultramem_ds.model.memory.retrieval import Retrieval
from ultramem_ds.planning.batches import plan_batches
from ultramem_ds.telemetry.phases import Phases
from ultramem_ds.train.engine import TrainEngine
from ultramem_ds.zero.runtime import Ranks, runtime

OPTIMIZERS = ("dense", "row-sparse", "row-sparse-catch-up")
SHAPE = [
    "model.hidden_size=256",
    "model.inner_size=512",
    "model.num_layers=2",
    "model.num_heads=4",
    "model.vocab_size=1024",
    "model.seq_len=128",
    "train.micro_batch_size=4",
    "train.global_batch_size=4",
    "memory.placement=1:2",
    "memory.value_dim=128",
    "memory.stats_every=0",
]
WARM_UP = 3


class Stopwatch:
    """Adds up the seconds of wrapped calls."""

    def __init__(self) -> None:
        self.elapsed_s = 0.0

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start_s = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.elapsed_s += time.perf_counter() - start_s

        return timed

    def take_ms(self) -> float:
        elapsed_s, self.elapsed_s = self.elapsed_s, 0.0
        return 1e3 * elapsed_s


def batches(config: Config) -> Iterator[MicroBatch]:
    generator = torch.Generator().manual_seed(0)
    shape = (config.train.global_batch_size, config.model.seq_len + 1)
    while True:
        tokens = torch.randint(config.model.vocab_size, shape, generator=generator)
        yield MicroBatch(tokens=tokens, sample_ids=())


class Subject:
    """One engine and the stopwatch on its table."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config = config
        json_values = load_deepspeed_json(None, config.model.kind)
        self.engine = TrainEngine(config, ranks, json_values, plan_batches(config, 1), Phases())
        self.samples: dict[str, list[float]] = {"table": [], "retrieval": [], "step": []}
        self.distinct_rows: list[int] = []
        self._table = table = Stopwatch()
        self._batches = batches(config)
        self._step = 0
        self._retrieval = Retrieval(config.model, config.memory)
        init_module(self._retrieval, config, config.train.seed)
        (memory,) = self.engine.model.memory_layers
        lookup: Any = memory.lookup
        lookup.executor.submit = table.wrap(lookup.executor.submit)
        tables: Any = self.engine.tables
        tables.publish_gradients = table.wrap(tables.publish_gradients)
        tables.finish_step = table.wrap(tables.finish_step)
        if config.memory.table_optimizer == "dense":
            self.engine.engine.step = table.wrap(self.engine.engine.step)
        start_lookup = lookup.start

        def start_and_count(rows_TK: torch.Tensor, *args: Any) -> Any:
            self.distinct_rows.append(rows_TK.unique().numel())
            return start_lookup(rows_TK, *args)

        lookup.start = start_and_count

    def run(self) -> None:
        """One step, one retrieval."""
        self._table.take_ms()
        start_s = time.perf_counter()
        self.engine.train_step(self._batches, self._step)
        self.samples["step"].append(1e3 * (time.perf_counter() - start_s))
        self.samples["table"].append(self._table.take_ms())
        self._step += 1
        model = self.config.model
        x_BSD = torch.randn(
            self.config.train.global_batch_size,
            model.seq_len,
            model.hidden_size,
            requires_grad=True,
        )
        start_s = time.perf_counter()
        self._retrieval(x_BSD).scores_TKh.sum().backward()
        self.samples["retrieval"].append(1e3 * (time.perf_counter() - start_s))
        self._retrieval.mark_stale()

    def row(self) -> dict[str, Any]:
        """The medians, warm-up left out."""
        return {
            "rows": self.config.memory.num_rows,
            "table_optimizer": self.config.memory.table_optimizer,
            "distinct_rows": sum(self.distinct_rows) / len(self.distinct_rows),
            **{name: Timing.of(ms[WARM_UP:]).as_row() for name, ms in self.samples.items()},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--knums", type=int, nargs="+", default=[362, 724, 1448])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    args = parser.parse_args()
    rows = []
    with runtime() as ranks:
        for optimizer in args.optimizers:
            subjects = []
            for knum in args.knums:
                keys = [f"memory.knum={knum}", f"memory.table_optimizer={optimizer}"]
                config = load_config("ultramem-debug", [*SHAPE, *args.overrides, *keys])
                subjects.append(Subject(config, ranks))
            for _ in range(WARM_UP + args.rounds):  # drift of the machine falls on all alike
                for subject in subjects:
                    subject.run()
            for subject in subjects:
                rows.append(subject.row())
                if not args.json:
                    print(describe(rows[-1], rows), flush=True)
                subject.engine.engine.destroy()
            del subject, subjects
            gc.collect()
    if args.json:
        print(json.dumps({"rows": rows, **header({"overrides": [*SHAPE, *args.overrides]})}))


def describe(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    base = next(r for r in rows if r["table_optimizer"] == row["table_optimizer"])
    cells = [
        f"{name} {row[name]['time_ms']:8.1f} ms "
        f"(x{row[name]['time_ms'] / base[name]['time_ms']:.2f})"
        for name in ("table", "retrieval", "step")
    ]
    return (
        f"{row['table_optimizer']:20} {row['rows']:>9,} rows, {row['distinct_rows']:>7,.0f} "
        f"distinct per step: {', '.join(cells)}"
    )


if __name__ == "__main__":
    main()
