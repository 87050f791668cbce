"""Sharded lookups against stock ZeRO-3, against each other, and against themselves in a thread.

    python benchmarks/sharding_bench.py [--ranks 2] [--tokens 2048] [--trace FILE] [--json]

Prints, from one run on local gloo ranks and the ultramem-151m-x12 layer:

1. per scheme and direction, time and bytes per rank, measured and predicted (``bench comm``);
2. bytes and time of what stock ZeRO-3 does with the same table: two all-gathers, one reduction;
3. the ratios that matter;
4. with Zipf-distributed ids, what de-duplication saves;
5. a step of two blocks between start and wait, synchronous against asynchronous, and (--trace)
   a Chrome trace of the asynchronous one.

T tokens, D hidden, V value width, P ranks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ultramem_ds.bench.comm import VARIANTS, CommBenchConfig, make_problems, run_comm_bench
from ultramem_ds.sharding.groups import make_groups
from ultramem_ds.sharding.lookup import build_lookup
from ultramem_ds.sharding.shard import TableShard
from ultramem_ds.sharding.table_plan import TableSpec, rows_per_rank, shard_layout
from ultramem_ds.testing.distributed import run_ranks

HIDDEN = 1024  # D of the blocks between start and wait


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--trace", type=Path, help="write a Chrome trace of an asynchronous step")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("overrides", nargs="*", help="section.key=value, of the layer")
    args = parser.parse_args()
    config = CommBenchConfig(
        tokens=args.tokens, ranks=args.ranks, rounds=args.rounds, overrides=tuple(args.overrides)
    )
    document = run_comm_bench(config)
    zipf = run_comm_bench(replace(config, ids="zipf", rounds=2))
    document["stock_zero3"] = run_ranks(stock_zero3, config.ranks, config, timeout_s=600)[0]
    document["ratios"] = ratios(document, zipf)
    document["overlap"] = run_ranks(overlap, config.ranks, config, args.trace, timeout_s=600)[0]
    if args.json:
        print(json.dumps(document))
        return
    for row in document["rows"]:
        print(
            f"{row['variant']:18} {row['direction']:8} {row['time_ms']:8.1f} ms "
            f"[{row['low_ms']:.1f}, {row['high_ms']:.1f}]  {row['bytes_sent'] / 1e6:8.2f} MB sent, "
            f"{row['predicted_bytes'] / 1e6:8.2f} predicted"
        )
    for name in ("stock_zero3", "ratios", "overlap", "rates", "hardware", "versions", "commit"):
        print(f"{name}: {document[name]}")


def ratios(document: dict[str, Any], zipf: dict[str, Any]) -> dict[str, float]:
    """How many times fewer bytes, how many times faster; forward and backward together."""

    def both(rows: list[dict[str, Any]], variant: str, key: str) -> float:
        return sum(row[key] for row in rows if row["variant"] == variant)

    rows, stock = document["rows"], document["stock_zero3"]
    row_shipping_ms = both(rows, "number-wise", "time_ms")
    found = {}
    for variant in VARIANTS:
        sent = both(rows, variant, "bytes_sent")
        found[f"stock ZeRO-3 bytes / {variant}"] = stock["bytes_sent"] / sent
        elapsed_ms = both(rows, variant, "time_ms")
        found[f"number-wise time / {variant}"] = row_shipping_ms / elapsed_ms
        found[f"stock ZeRO-3 communication time / {variant}"] = stock["time_ms"] / elapsed_ms
    found["zipf ids: number-wise bytes / dedup"] = both(
        zipf["rows"], "number-wise", "bytes_sent"
    ) / both(zipf["rows"], "number-wise dedup", "bytes_sent")
    return found


def stock_zero3(rank: int, world_size: int, config: CommBenchConfig) -> dict[str, float]:
    """One step's communication if the table were gathered like any ZeRO-3 parameter.

    In 16 pieces, each dropped on arrival: the whole table twice over would not fit this machine.
    """
    comm, memory = make_groups().shard, config.memory
    numel = rows_per_rank(memory.num_rows, world_size) * memory.value_dim
    parts = [1] * world_size
    elapsed_s = 0.0
    for piece in torch.full((numel,), 0.01).tensor_split(16):
        gradient = torch.full((world_size, piece.numel()), 0.01)
        comm.barrier()
        start_s = time.perf_counter()
        for _ in range(2):  # forward and backward
            comm.all_gather(piece, "rows")
        comm.transfer(gradient, parts, parts, "gradients", "backward").sum(0)  # reduce-scatter
        elapsed_s += time.perf_counter() - start_s
    return {"time_ms": 1e3 * elapsed_s, "bytes_sent": float(sum(comm.bytes_sent.values()))}


def overlap(
    rank: int, world_size: int, config: CommBenchConfig, trace: Path | None
) -> dict[str, float]:
    """Milliseconds of a step, and how long lookups and blocks ran at the same time."""
    memory = config.memory
    spec = TableSpec.from_config(memory, 0)
    layout = shard_layout(spec, "owner-pooled", world_size, rank)
    storage = torch.full(layout.shape, 0.01)
    problems = make_problems(config, spec, rank)
    weight_DD = (torch.randn(HIDDEN, HIDDEN) / HIDDEN**0.5).requires_grad_()
    found: dict[str, float] = {}
    for name in ("synchronous", "asynchronous"):
        groups = make_groups(asynchronous=name == "asynchronous")
        shard = TableShard(spec, layout, lambda: storage, groups.replicas)
        lookup = build_lookup(shard, "owner-pooled", groups, memory)

        def step(lookup: Any = lookup) -> None:
            rows_TK, projectors_TK, scores_TKh, grad_TEV = next(problems)
            # One leaf for both, as in a model: start's backward runs after the blocks'.
            x_TD = torch.ones(config.tokens, HIDDEN, requires_grad=True)
            scores_TKh = scores_TKh.detach() * x_TD[:, :1, None]
            pending = lookup.start(rows_TK, projectors_TK, scores_TKh)
            hidden_TD = x_TD * 1.0
            for _ in range(8):
                with record_function("block"):
                    hidden_TD = hidden_TD @ weight_DD
            pooled_TEV = pending.wait()
            ((pooled_TEV * grad_TEV).sum() + hidden_TD.sum()).backward()

        step()
        times_ms = []
        for _ in range(config.rounds):
            groups.replicas.barrier()
            start_s = time.perf_counter()
            step()
            times_ms.append(1e3 * (time.perf_counter() - start_s))
        found[f"{name}_ms"] = statistics.median(times_ms)
    if trace is not None:
        found |= _traced(step, trace.with_name(f"{trace.stem}-rank{rank}{trace.suffix}"))
    return found


def _traced(step: Any, path: Path) -> dict[str, float]:
    """Writes a trace of one step; milliseconds in which both threads worked."""
    options = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with profile(activities=[ProfilerActivity.CPU], experimental_config=options) as profiler:
        step()
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    spans: dict[str, list[tuple[float, float]]] = {"lookup": [], "blocks": []}
    for event in events:
        name = event.get("name", "")
        span = (event.get("ts", 0.0), event.get("ts", 0.0) + event.get("dur", 0.0))
        if name.startswith("ultramem::") or name in ("_AllToAllBackward", "_LookupReduceBackward"):
            spans["lookup"].append(span)
        elif name in ("block", "MmBackward0"):
            spans["blocks"].append(span)
    both_us = sum(
        max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
        for a in spans["lookup"]
        for b in spans["blocks"]
    )
    return {"trace_overlap_ms": both_us / 1e3}


if __name__ == "__main__":
    main()
