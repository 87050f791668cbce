"""``bench comm``: the two rates the planner needs, and every partition scheme side by side.

Ids are uniform (or Zipf-distributed over shuffled rows, a stand-in for natural text) and differ
from round to round. Every round runs each variant once, so drift of the machine falls on all.

Letters: T tokens per rank, K rows per token, h cores, E expansion, V value width, P ranks.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ultramem_ds.bench.common import Timing, header
from ultramem_ds.config.load import load_config
from ultramem_ds.config.schema import MemoryConfig
from ultramem_ds.planning.costs import lookup_cost, stock_zero3_bytes
from ultramem_ds.planning.rates import memory_gb_per_s, wire_gb_per_s
from ultramem_ds.sharding.comm import Comm
from ultramem_ds.sharding.groups import CPU, make_groups
from ultramem_ds.sharding.lookup import ShardedLookup, build_lookup
from ultramem_ds.sharding.shard import TableShard
from ultramem_ds.sharding.table_plan import ShardLayout, TableSpec, shard_layout
from ultramem_ds.testing.distributed import run_ranks

# variant -> (scheme, de-duplicated)
VARIANTS = {
    "number-wise": ("number-wise", False),
    "number-wise dedup": ("number-wise", True),
    "owner-pooled": ("owner-pooled", False),
    "dimension-wise": ("dimension-wise", False),
}
RATE_BYTES = 64 << 20  # payload of a bandwidth sample


@dataclass(frozen=True, kw_only=True)
class CommBenchConfig:
    """One memory layer of a preset, and how to measure.

    Attributes:
        preset: whose memory layer.
        overrides: of its configuration, ``section.key=value``.
        tokens: T, per rank.
        ranks: P, gloo processes of this machine.
        ids: ``uniform``, or ``zipf`` (exponent 1, rows shuffled).
        rounds: samples per variant.
        timeout_s: limit for the whole measurement.
    """

    preset: str = "ultramem-151m-x12"
    overrides: tuple[str, ...] = ()
    tokens: int = 2048
    ranks: int = 2
    ids: str = "uniform"
    rounds: int = 5
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.ranks < 1:
            raise ValueError(f"tokens={self.tokens}, ranks={self.ranks}: both at least 1")
        if self.ids not in ("uniform", "zipf"):
            raise ValueError(f"ids={self.ids}: use uniform or zipf")
        if self.rounds < 2:
            raise ValueError(f"rounds={self.rounds}: at least 2 are needed for a spread")

    @property
    def memory(self) -> MemoryConfig:
        """The layer's configuration."""
        config = load_config(self.preset, self.overrides)
        if not config.has_memory:
            raise ValueError(f"preset {self.preset} has no memory layers")
        return config.memory


def run_comm_bench(config: CommBenchConfig) -> dict[str, Any]:
    """Measure on ``config.ranks`` local ranks; ``{"rows", "rates", hardware, versions, ...}``.

    Rows are ``{variant, direction, time_ms, low_ms, high_ms, rounds, bytes_sent,
    predicted_bytes}``, bytes per rank and call (mean over ranks); ``rates`` has
    ``wire_gb_per_s`` and ``memory_gb_per_s``, the settings of those names under ``memory``.

    Raises:
        ValueError: a preset without memory layers, or a scheme that the sizes do not allow.
    """
    memory = config.memory  # refuses a bad preset before any rank starts
    per_rank = run_ranks(_rank_body, config.ranks, config, timeout_s=config.timeout_s)
    samples, rates = per_rank[0]["samples"], per_rank[0]["rates"]
    rows = []
    for (variant, direction), samples_ms in samples.items():
        scheme, dedup = VARIANTS[variant]
        cost = lookup_cost(
            replace(memory, dedup=dedup),
            scheme,
            tokens=config.tokens,
            ranks=config.ranks,
            value_bytes=4,
        )
        sent = [found["bytes_sent"][variant, direction] for found in per_rank]
        rows.append(
            {
                "variant": variant,
                "direction": direction,
                **Timing.of(samples_ms).as_row(),
                "bytes_sent": sum(sent) / len(sent),
                "predicted_bytes": sum(getattr(cost, direction).values()),
            }
        )
    stock = stock_zero3_bytes(memory, config.ranks, 4)
    return {
        "rows": rows,
        "rates": rates,
        "stock_zero3_bytes": stock,
        **header({**asdict(config), "memory": asdict(memory)}),
    }


def _rank_body(rank: int, world_size: int, config: CommBenchConfig) -> dict[str, Any]:
    memory = config.memory
    groups = make_groups()
    samples: dict[tuple[str, str], list[float]] = {}
    sent: dict[tuple[str, str], float] = {}
    spec = TableSpec.from_config(memory, 0)
    whole_rows = shard_layout(spec, "number-wise", world_size, rank)
    # Written, hence real pages; every scheme sees the same memory in its own shape.
    storage = torch.full((whole_rows.num_rows * spec.value_dim,), 0.01)
    shards: dict[ShardLayout, TableShard] = {}  # row schemes share one gradient buffer
    lookups = {}
    for variant, (scheme, dedup) in VARIANTS.items():
        layout = shard_layout(spec, scheme, world_size, rank)
        shard = shards.setdefault(layout, _shard(spec, layout, storage, groups.replicas))
        lookups[variant] = build_lookup(shard, scheme, groups, replace(memory, dedup=dedup))
    problems = make_problems(config, spec, rank)
    for round_index in range(config.rounds + 1):
        for variant, lookup in lookups.items():
            groups.shard.bytes_sent.clear()
            forward_ms, backward_ms = _time_call(lookup, next(problems), groups.replicas)
            if round_index == 0:  # first touches, connections
                continue
            samples.setdefault((variant, "forward"), []).append(forward_ms)
            samples.setdefault((variant, "backward"), []).append(backward_ms)
            total: Counter[str] = Counter()
            for (_, direction), size in groups.shard.bytes_sent.items():
                total[direction] += size
            sent[variant, "forward"] = total["forward"]
            sent[variant, "backward"] = total["backward"]
    rates = {
        "wire_gb_per_s": wire_gb_per_s(groups.shard, config.rounds, CPU, RATE_BYTES),
        "memory_gb_per_s": memory_gb_per_s(
            storage.view(whole_rows.shape), config.rounds, RATE_BYTES
        ),
    }
    return {"samples": samples, "bytes_sent": sent, "rates": rates}


def _shard(spec: TableSpec, layout: ShardLayout, storage: Tensor, replicas: Comm) -> TableShard:
    numel = layout.num_rows * layout.num_columns
    return TableShard(spec, layout, lambda: storage[:numel], replicas)


def _time_call(
    lookup: ShardedLookup, problem: tuple[Tensor, Tensor, Tensor, Tensor], everyone: Comm
) -> tuple[float, float]:
    rows_TK, projectors_TK, scores_TKh, grad_TEV = problem
    everyone.barrier()
    start_s = time.perf_counter()
    pooled_TEV = lookup.start(rows_TK, projectors_TK, scores_TKh).wait()
    middle_s = time.perf_counter()
    pooled_TEV.backward(grad_TEV)
    return 1e3 * (middle_s - start_s), 1e3 * (time.perf_counter() - middle_s)


def make_problems(
    config: CommBenchConfig, spec: TableSpec, rank: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Rows, projectors, scores and the output's gradient of one call after the other."""
    memory = config.memory
    gen = torch.Generator().manual_seed(rank)
    shuffle = torch.randperm(spec.num_rows, generator=torch.Generator().manual_seed(0))
    shape = (config.tokens, memory.rows_per_token)
    while True:
        if config.ids == "zipf":
            # Inverse of the continuous Zipf law of exponent 1 over 1..N.
            uniform = torch.rand(shape, generator=gen, dtype=torch.float64)
            order = (float(spec.num_rows) ** uniform).long() - 1
            rows_TK = shuffle[order]
        else:
            rows_TK = torch.randint(0, spec.num_rows, shape, generator=gen)
        projectors_TK = torch.randint(0, spec.num_projectors, shape, generator=gen)
        scores_TKh = torch.randn(*shape, spec.num_cores, generator=gen, requires_grad=True)
        grad_shape = (config.tokens, spec.num_projectors, spec.value_dim)
        yield rows_TK, projectors_TK, scores_TKh, torch.randn(grad_shape, generator=gen)
