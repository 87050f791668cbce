"""Launches, copies and waits of one training step on a GPU, counted by torch's profiler.

    python -m benchmarks.step_profile --variant ultramem

The step is that of ``bench step`` (``--shape``, one rank). Prints one line per CUDA runtime call
that launches, copies or waits: how often per step, and the host's time in it; then how long the
device computed. Without a GPU: torch's operators, the longest first.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ultramem_ds.bench.step import (
    SHAPES,
    VARIANTS,
    WARMUP,
    StepBenchConfig,
    engine_step,
    step_configs,
)
from ultramem_ds.telemetry.phases import Phases
from ultramem_ds.testing.distributed import run_ranks
from ultramem_ds.zero.runtime import Ranks

RUNTIME = ("Launch", "Memcpy", "Memset", "Synchronize")


def count(rank: int, world_size: int, bench: StepBenchConfig, steps: int) -> list[dict[str, Any]]:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    (config,) = step_configs(bench, 0, bench.sequences[0]).values()
    step = engine_step(config, Ranks(rank, world_size, rank, device), Phases())
    for _ in range(WARMUP):
        step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
    rows = [
        {
            "name": event.key,
            "per_step": event.count / steps,
            "host_ms": event.self_cpu_time_total / steps / 1e3,
            "device_ms": event.self_device_time_total / steps / 1e3,
        }
        for event in profiler.key_averages()
    ]
    if cuda:
        busy = sum(row["device_ms"] for row in rows)
        rows = [row for row in rows if any(part in row["name"] for part in RUNTIME)]
        rows.append({"name": "device busy", "per_step": 1.0, "host_ms": 0.0, "device_ms": busy})
    return sorted(rows, key=lambda row: -row["per_step" if cuda else "host_ms"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=[v for v in VARIANTS if v != "plain"], required=True)
    parser.add_argument("--shape", choices=SHAPES, default="151m-layers")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    bench = StepBenchConfig(
        shape=args.shape,
        ranks=(1,),
        sequences=(args.sequences,),
        seq_len=args.seq_len,
        variants=(args.variant,),
        precision=args.precision,
    )
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    rows = run_ranks(count, 1, bench, args.steps, backend=backend)[0]
    for row in rows[:40]:
        print(
            f"{row['name'][:60]:60} {row['per_step']:8.1f} a step  host {row['host_ms']:7.3f} ms"
            f"  device {row['device_ms']:7.3f} ms"
        )


if __name__ == "__main__":
    main()
