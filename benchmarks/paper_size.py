"""Real widths and depths on local ranks: tokens/s, memory against the plan, phases, series.

    python benchmarks/paper_size.py [--ranks 2] [--steps 10] [--sequences 2] [PRESET ...]
        [--set section.key=value ...]

Each preset trains on random tokens, on one rank and on ``--ranks``, with the same micro-batch; by
default in bf16 with the smallest table (and the fewest experts) that shows its shape, full width
and depth. Prints one row per run: tokens per second of the steps after the first, resident memory
of the largest rank after the last step and at its peak, what ``plan`` predicts, and the seconds of
a step by phase; then how far the losses of the ranks are from those of one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ultramem_ds.config.deepspeed import BatchPlan, load_deepspeed_json
from ultramem_ds.config.load import load_config
from ultramem_ds.config.schema import Config
from ultramem_ds.data.micro_batch import MicroBatch
from ultramem_ds.planning.planner import make_plan
from ultramem_ds.telemetry.memory_use import memory_bytes, peak_memory_bytes
from ultramem_ds.telemetry.phases import Phases
from ultramem_ds.telemetry.report import markdown_table
from ultramem_ds.testing.distributed import run_ranks
from ultramem_ds.train.engine import TrainEngine
from ultramem_ds.zero.deepspeed_import import deepspeed
from ultramem_ds.zero.runtime import Ranks

PRESETS = {
    "dense-151m": (),
    "pkm-151m-x12": ("memory.knum=128",),
    "ultramem-151m-x12": ("memory.knum=64",),
    "moe-151m-2in32": ("moe.num_experts=4",),
}
SHARED = ("model.vocab_size=4096", "model.seq_len=64", "model.dropout=0", "optim.lr=1e-4")
CPU = torch.device("cpu")


def random_batches(config: Config, ranks: Ranks, micro: int) -> Iterator[MicroBatch]:
    """This rank's micro-batches of each step; every number of ranks sees the same sequences."""
    step = 0
    while True:
        generator = torch.Generator().manual_seed(step)
        shape = (config.train.global_batch_size, config.model.seq_len + 1)
        tokens = torch.randint(config.model.vocab_size, shape, generator=generator)
        for part in tokens.split(micro)[ranks.rank :: ranks.world_size]:
            yield MicroBatch(tokens=part, sample_ids=())
        step += 1


def run_body(rank: int, world_size: int, config: Config, steps: int) -> dict[str, Any]:
    """Losses, seconds, memory and phases of one rank."""
    deepspeed.init_distributed("gloo", verbose=False)
    ranks, phases = Ranks(rank, world_size, rank, CPU), Phases()
    micro = config.train.micro_batch_size
    batches = BatchPlan(
        config.train.global_batch_size, micro, config.train.global_batch_size // micro // world_size
    )
    before = memory_bytes(CPU)
    engine = TrainEngine(
        config, ranks, load_deepspeed_json(None, config.model.kind), batches, phases
    )
    micro_batches = random_batches(config, ranks, micro)
    losses, seconds, spent = [], [], {}
    for step in range(steps):
        phases.begin_step(step + 1)
        phases.take_seconds()
        start_s = time.perf_counter()
        losses.append(engine.train_step(micro_batches, step).loss)
        seconds.append(time.perf_counter() - start_s)
        spent = phases.take_seconds()
    return {
        "losses": losses,
        "seconds": seconds,
        "phases": spent,
        "libraries": before,
        "resident": memory_bytes(CPU),
        "peak": peak_memory_bytes(CPU),
    }


def measure(preset: str, world_size: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run: what rank 0 saw, the largest rank's memory, and the plan."""
    overrides = [*SHARED, "train.precision=bf16", *PRESETS.get(preset, ())]
    overrides += [f"train.global_batch_size={args.sequences}", "train.micro_batch_size=1"]
    config = load_config(preset, [*overrides, *args.set])
    found = run_ranks(run_body, world_size, config, args.steps, timeout_s=args.timeout)
    memory = {key: max(rank[key] for rank in found) for key in ("libraries", "resident", "peak")}
    plan = make_plan(config, world_size).memory
    tokens = args.sequences * config.model.seq_len
    return {
        **found[0],
        **memory,
        "plan": plan.total,
        "tokens_per_s": tokens / median(found[0]["seconds"][1:] or found[0]["seconds"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("presets", nargs="*", default=list(PRESETS), metavar="PRESET")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--sequences", type=int, default=2, help="of 64 tokens, per step")
    parser.add_argument("--timeout", type=float, default=7200, help="seconds for one run")
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value")
    args = parser.parse_args()
    rows, apart = [], []
    for preset in args.presets:
        runs = {ranks: measure(preset, ranks, args) for ranks in sorted({1, args.ranks})}
        for ranks, run in runs.items():
            spent = ", ".join(f"{name} {s:.2f}" for name, s in run["phases"].items() if s >= 0.005)
            sizes = [run[key] / 1e9 for key in ("libraries", "resident", "peak", "plan")]
            row = [preset, str(ranks), f"{run['tokens_per_s']:.0f}", *(f"{x:.2f}" for x in sizes)]
            rows.append([*row, spent])
        one, several = (runs[ranks]["losses"] for ranks in (1, args.ranks))
        worst = max(abs(a / b - 1) for a, b in zip(several, one))
        apart.append([preset, f"{one[0]:.4f}", f"{one[-1]:.4f}", f"{worst:.1e}"])
    header = ["preset", "ranks", "tokens/s", "libraries GB", "resident GB", "peak GB", "plan GB"]
    print(markdown_table([*header, "seconds of the last step"], rows))
    print()
    print(markdown_table(["preset", "first loss", "last loss", "ranks from one, at most"], apart))


if __name__ == "__main__":
    main()
