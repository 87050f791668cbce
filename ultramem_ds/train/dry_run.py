"""What a run would need and how long it would take, without training or writing anything."""

from __future__ import annotations

import shutil
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from ultramem_ds.checkpoint import directory as checkpoints
from ultramem_ds.config.deepspeed import kept_from_offload, offload_device
from ultramem_ds.config.schema import Config
from ultramem_ds.data.manifest import load_manifest
from ultramem_ds.model.accounting import count, training_flops_per_token
from ultramem_ds.planning.planner import Plan, make_plan
from ultramem_ds.telemetry.metrics import METRICS, read_lines
from ultramem_ds.train.fitting import device_bytes, ways_to_fit
from ultramem_ds.train.run import Run

RECENT_STEPS = 50  # of the run so far, that an estimate is made from
BENCHMARK_FLOPS = 4e9  # of one sample of the micro-benchmark, at most


@dataclass(frozen=True)
class TimeEstimate:
    """How long a step takes, and how that is known.

    Attributes:
        step_s: seconds per optimizer step.
        basis: where the number is from, in words.
    """

    step_s: float
    basis: str


def checkpoint_bytes(config: Config, stage: int) -> int:
    """Size of one checkpoint on disk: fp32 masters, two moments, under ZeRO-1/2 the weights too."""
    size = count(config)
    params = size.params + size.norm_params + 2 * config.model.vocab_size * config.model.hidden_size
    weight = 0 if stage == 3 else 2 if config.train.precision == "bf16" else 4
    return params * (12 + weight)


def existing_parent(path: Path) -> Path:
    """``path`` itself or the nearest directory above it that exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.is_dir())


def estimate_step(run: Run, plan: Plan) -> TimeEstimate:
    """From the run's own recent steps on as many ranks, else from a short benchmark here."""
    if run.resume_from is not None:
        state = checkpoints.read_trainer_state(run.resume_from)
        records = read_lines(run.run_dir / METRICS)[-RECENT_STEPS:]
        times_s = [float(record["step_time_s"]) for record in records if "step_time_s" in record]
        if times_s and state.world_size == run.world_size:
            basis = f"median of this run's last {len(times_s)} steps"
            return TimeEstimate(statistics.median(times_s), basis)
    config = run.config
    tokens = run.batches.global_batch_size * config.model.seq_len / run.world_size
    rate = _matmul_flops_per_s(config, run.batches.micro_batch_size)
    lookups_s = sum(
        scheme.predicted_step_ms / 1e3 * run.batches.accumulation_steps
        for scheme in plan.schemes
        if scheme.scheme == plan.partition
    )
    step_s = tokens * training_flops_per_token(config) / rate + lookups_s
    basis = (
        f"matrix products of the MLP's shape measured on this machine with "
        f"{torch.get_num_threads()} threads, {rate / 1e9:,.0f} GFLOP/s"
        + (", plus the planner's lookups" if lookups_s else "")
        + "; the rest of a step comes on top"
    )
    return TimeEstimate(step_s, basis)


def _matmul_flops_per_s(config: Config, micro_batch_size: int) -> float:
    """Rate of one MLP's first projection, forward and backward; the best of three."""
    hidden, inner = config.model.hidden_size, config.model.inner_size
    tokens = min(micro_batch_size * config.model.seq_len, 1024)
    tokens = max(16, min(tokens, int(BENCHMARK_FLOPS / (6 * hidden * inner))))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    x_TD = torch.ones(tokens, hidden, device=device, dtype=dtype, requires_grad=True)
    weight_DI = torch.ones(hidden, inner, device=device, dtype=dtype, requires_grad=True)
    best_s = float("inf")
    for _ in range(4):
        begin = time.perf_counter()
        (x_TD @ weight_DI).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best_s = min(best_s, time.perf_counter() - begin)
    return 6 * tokens * hidden * inner / best_s


def dry_run(run: Run) -> dict[str, Any]:
    """The run's numbers as plain values; see :func:`describe`.

    Raises:
        ValueError: data, weights or batches do not fit.
    """
    config, batches = run.config, run.batches
    fixed = replace(config, train=replace(config.train, micro_batch_size=batches.micro_batch_size))
    plan = make_plan(fixed, run.world_size, run.deepspeed_json)
    done = 0
    if run.resume_from is not None:
        done = checkpoints.read_trainer_state(run.resume_from).step
    last = min(config.train.max_steps, config.train.stop_at_step or config.train.max_steps)
    to_do = max(0, last - done)
    estimate = estimate_step(run, plan)
    tokens_per_step = batches.global_batch_size * config.model.seq_len
    size = count(config)
    prepared = sum(info.tokens for info in load_manifest(run.data_dir).of_split("train").values())
    here = existing_parent(run.run_dir)
    on_gpu, available = torch.cuda.is_available(), _available_bytes()
    needed = device_bytes(plan, run.deepspeed_json, on_gpu)
    ways: list[str] = []
    if needed > available:
        ways = ways_to_fit(fixed, run.world_size, run.deepspeed_json, available, on_gpu)
    return {
        "preset": config.preset,
        "world_size": run.world_size,
        "zero_stage": plan.zero_stage,
        "offload": offload_device(run.deepspeed_json),
        "kept_from_offload": kept_from_offload(run.deepspeed_json, config),
        "partition": plan.partition,
        "params": size.params,
        "sparse_params": size.sparse_params,
        "global_batch_size": batches.global_batch_size,
        "micro_batch_size": batches.micro_batch_size,
        "accumulation_steps": batches.accumulation_steps,
        "seq_len": config.model.seq_len,
        "steps_done": done,
        "steps_to_do": to_do,
        "tokens_to_do": to_do * tokens_per_step,
        "prepared_tokens": prepared,
        "subsets": list(run.mixture.subsets),
        "memory_bytes": plan.memory.parts(),
        "device_bytes": needed,
        "available_bytes": available,
        "ways_to_fit": ways,
        "checkpoint_bytes": checkpoint_bytes(config, plan.zero_stage),
        "save_every": config.train.save_every,
        "checkpoints_kept": config.train.keep_last,
        "disk": str(here),
        "disk_free_bytes": shutil.disk_usage(here).free,
        "step_s": estimate.step_s,
        "total_s": estimate.step_s * to_do,
        "tokens_per_s": tokens_per_step / estimate.step_s,
        "basis": estimate.basis,
    }


def _available_bytes() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)


def problems(found: dict[str, Any]) -> list[str]:
    """What would go wrong later, in words."""
    result = []
    # One more than are kept: the new one is complete before an old one goes.
    kept = found["checkpoints_kept"] or 1
    one, free = found["checkpoint_bytes"], found["disk_free_bytes"]
    needed = one * (kept + 1)
    if needed > free:
        fewer = next((n for n in range(kept - 1, 0, -1) if one * (n + 1) <= free), 0)
        result.append(
            f"{found['disk']} has {free / 1e9:.1f} GB free, {kept + 1} checkpoints need "
            f"{needed / 1e9:.1f} GB: free some, "
            + (f"set train.keep_last={fewer}, " if fewer else "")
            + "or use another --run-dir"
        )
    if found["device_bytes"] > found["available_bytes"]:
        ways = found["ways_to_fit"]
        result.append(
            f"a rank needs {found['device_bytes'] / 1e9:.1f} GB, this machine has "
            f"{found['available_bytes'] / 1e9:.1f} GB free: "
            + (
                f"use {' or '.join(ways)}"
                if ways
                else "more ranks, smaller micro-batches and offload are not enough"
            )
        )
    return result


def describe(found: dict[str, Any]) -> str:
    """The numbers as text, problems last."""
    memory = found["memory_bytes"]
    parts = ", ".join(f"{k} {v / 1e9:.3f}" for k, v in memory.items() if k != "total")
    steps = f"{found['steps_to_do']:,} to do"
    if found["steps_done"]:
        steps += f", {found['steps_done']:,} done"
    save = f"every {found['save_every']} steps" if found["save_every"] else "at the end"
    kept = f"{found['checkpoints_kept']} kept" if found["checkpoints_kept"] else "all kept"
    offload = "" if found["offload"] == "none" else f", optimizer on {found['offload']}"
    table = f", tables {found['partition']}" if found["partition"] else ""
    epochs = found["tokens_to_do"] / max(1, found["prepared_tokens"])
    rows = {
        "model": f"{found['params'] / 1e6:,.2f} M parameters, {found['sparse_params'] / 1e6:,.2f} "
        f"M of them sparse; ZeRO-{found['zero_stage']}{offload}{table}",
        "batch": f"{found['global_batch_size']} sequences of {found['seq_len']} tokens = "
        f"{found['world_size']} ranks x {found['micro_batch_size']} sequences x "
        f"{found['accumulation_steps']} forwards",
        "steps": f"{steps}: {found['tokens_to_do']:,} tokens, {epochs:.2f} times the "
        f"{found['prepared_tokens']:,} prepared",
        "memory/rank": f"{memory['total'] / 1e9:.3f} GB ({parts}); "
        f"{found['available_bytes'] / 1e9:.1f} GB free here",
        "checkpoint": f"{found['checkpoint_bytes'] / 1e9:.3f} GB {save}, {kept}; "
        f"{found['disk_free_bytes'] / 1e9:.1f} GB free on {found['disk']}",
        "time": f"{duration(found['total_s'])} at {found['step_s']:.3g} s per step, "
        f"{found['tokens_per_s']:,.0f} tokens/s",
        "": f"from: {found['basis']}",
    }
    lines = [f"dry run of {found['preset']} on {found['world_size']} ranks: nothing is written"]
    lines += [f"  {name:12} {text}" for name, text in rows.items()]
    if found["kept_from_offload"]:
        lines.append(f"  {'note':12} {found['kept_from_offload']}")
    lines += [f"  problem      {text}" for text in problems(found)]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Days, hours, minutes and seconds, as ``3d 4:05:06`` or ``0:00:07``."""
    days, rest = divmod(int(seconds), 86_400)
    text = f"{rest // 3600:d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}d {text}" if days else text
