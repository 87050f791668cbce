"""Peak memory per rank with one large table: building, training, loading at another world size.

    python benchmarks/largest_table.py --ranks 2 [--knum 3600] [--save DIR]
    python benchmarks/largest_table.py --ranks 4 --load DIR

A rank's peak is its largest resident memory (VmHWM), started again before each phase. The base is
what the process holds with everything imported and no model.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ultramem_ds.checkpoint.directory import latest_checkpoint
from ultramem_ds.config.deepspeed import load_deepspeed_json
from ultramem_ds.config.load import load_config
from ultramem_ds.config.schema import Config
from ultramem_ds.data.micro_batch import MicroBatch
from ultramem_ds.planning.batches import plan_batches
from ultramem_ds.telemetry.phases import Phases
from ultramem_ds.telemetry.report import markdown_table
from ultramem_ds.testing.distributed import run_ranks
from ultramem_ds.train.engine import TrainEngine
from ultramem_ds.zero.deepspeed_import import deepspeed
from ultramem_ds.zero.runtime import Ranks

TINY = [
    "model.num_layers=2",
    "model.vocab_size=256",
    "model.seq_len=64",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "memory.placement=1:2",
    "memory.value_dim=64",
    "memory.stats_every=0",
    "memory.table_optimizer=row-sparse",
]
STEPS = 3


def status_mib(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise ValueError(key)


def peak_mib(phase: Callable[[], object]) -> tuple[float, float]:
    """The largest resident memory while ``phase`` runs, and its seconds."""
    Path("/proc/self/clear_refs").write_text("5")
    start_s = time.perf_counter()
    phase()
    return status_mib("VmHWM"), time.perf_counter() - start_s


def batches(config: Config) -> Iterator[MicroBatch]:
    shape = (config.train.micro_batch_size, config.model.seq_len + 1)
    generator = torch.Generator().manual_seed(0)
    while True:
        tokens = torch.randint(config.model.vocab_size, shape, generator=generator)
        yield MicroBatch(tokens=tokens, sample_ids=())


def body(rank: int, world_size: int, config: Config, load: Path | None, save: Path | None) -> Any:
    """Peak and seconds by phase."""
    deepspeed.init_distributed("gloo", verbose=False)
    ranks = Ranks(rank, world_size, rank, torch.device("cpu"))
    json = load_deepspeed_json(None, config.model.kind)
    found = {"base": (status_mib("VmRSS"), 0.0)}
    engine: Any = None

    def build() -> None:
        nonlocal engine
        plan = plan_batches(config, world_size)
        engine = TrainEngine(config, ranks, json, plan, Phases())

    found["building"] = peak_mib(build)
    found["held"] = (status_mib("VmRSS"), 0.0)
    if load is not None:
        latest = latest_checkpoint(load)
        assert latest is not None, load
        found["loading"] = peak_mib(lambda: engine.load(latest))
    stream = batches(config)
    found["training"] = peak_mib(lambda: [engine.train_step(stream, s) for s in range(STEPS)])
    if save is not None:
        found["saving"] = peak_mib(lambda: engine.save(save, STEPS, "benchmark"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--knum", type=int, default=3600, help="N = knum^2")
    parser.add_argument("--load", type=Path, help="run directory, of any number of ranks")
    parser.add_argument("--save", type=Path, help="run directory")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    args = parser.parse_args()
    keys = [*TINY, f"memory.knum={args.knum}", *args.overrides]
    config = load_config("ultramem-debug", keys)
    memory = config.memory
    by_rank = run_ranks(body, args.ranks, config, args.load, args.save, timeout_s=900)
    state = memory.num_rows * memory.value_dim * 12 / 2**20
    print(
        f"{memory.num_rows:,} rows x {memory.value_dim} fp32 = {memory.num_slots:,} slots; values "
        f"and moments {state:,.0f} MiB, {state / args.ranks:,.0f} MiB per rank on {args.ranks}\n"
    )
    rows = []
    for phase in by_rank[0]:
        peaks = [found[phase][0] for found in by_rank]
        seconds = max(found[phase][1] for found in by_rank)
        rows.append([phase, f"{max(peaks):,.0f}", f"{sum(peaks):,.0f}", f"{seconds:.0f}"])
    print(markdown_table(["phase", "MiB, largest rank", "MiB, all ranks", "s"], rows))


if __name__ == "__main__":
    main()
