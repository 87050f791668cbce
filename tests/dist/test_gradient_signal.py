"""``grad_signal/*`` of live engines against the gradients that their optimizers were handed."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.dist.elastic_series import Leg, build_engine, micro_batches
from ultramem_ds.config.deepspeed import CONFIG_DIR
from ultramem_ds.testing.distributed import run_ranks
from ultramem_ds.train.engine import TrainEngine

pytestmark = pytest.mark.dist

STEPS = 6
BETA1, BETA2 = 0.9, 0.95  # the presets'
QUERIES = {"memory_query", "memory_conv"}


def label(param: Any) -> str:
    if param.role == "table":
        return "tables"
    if not getattr(param, "allreduce", True):  # DeepSpeed's mark of an expert
        return "experts"
    return {"memory_keys": "keys"}.get(param.init, "queries" if param.init in QUERIES else "dense")


def recorded_body(rank: int, world_size: int, leg: Leg) -> tuple[list[Any], list[Any], list[Any]]:
    """(metrics by step, flat buffers, rows): gradients as Adam got them, with their labels."""
    engine = build_engine(leg, rank, world_size)
    zero = engine.engine.optimizer
    adam = zero.optimizer
    by_master: dict[int, list[Tensor]] = {}

    def record(*_: Any) -> None:
        scale = getattr(adam, "grad_scale", None)
        for param in (p for group in adam.param_groups for p in group["params"]):
            if param.grad is not None:
                grad = param.grad if scale is None else param.grad / scale
                by_master.setdefault(id(param), []).append(grad.detach().double().clone())

    adam.register_step_pre_hook(record)
    rows = record_rows(engine)
    batches = micro_batches(leg.config, engine.ranks, 0)
    metrics = [engine.train_step(batches, step).statistics for step in range(STEPS)]
    buffers = []
    if engine.zero_stage == 3:
        for params, master in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat):
            sizes = [(label(p), p.partition_numel()) for p in params]
            buffers.append((sizes, by_master[id(master)]))
    else:
        for params, master in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups):
            buffers.append(([(label(p), p.numel()) for p in params], by_master[id(master)]))
    return [metrics, buffers, rows]  # type: ignore[return-value]


def record_rows(engine: TrainEngine) -> list[tuple[list[int], Tensor]]:
    """What row-sparse tables are stepped with, from here on."""
    found: list[tuple[list[int], Tensor]] = []
    for shard in getattr(engine.tables, "row_shards", ()):
        update = shard.adam.update

        def keep(rows: Tensor, grad: Tensor, lr: float, scale: float, update: Any = update) -> None:
            found.append((rows.tolist(), grad.double().clone() * scale))
            update(rows, grad, lr, scale)

        shard.adam.update = keep
    return found


def sums(series: list[Tensor]) -> Tensor:
    """(squared mean, power) of elements from all their gradients, noise taken out."""
    count = len(series)
    w = [BETA1 ** (count - 1 - i) for i in range(count)]
    u = [BETA2 ** (count - 1 - i) for i in range(count)]
    mean = sum(a * g for a, g in zip(w, series)) / sum(w)
    power = float(sum(a * (g * g).sum() for a, g in zip(u, series))) / sum(u)
    floor = sum(a * a for a in w) / sum(w) ** 2
    return torch.tensor([(float((mean * mean).sum()) - floor * power) / (1 - floor), power])


def by_hand(ranks: list[Any], stage: int) -> dict[str, float]:
    """``grad_signal/*`` after the last step, from what all ranks recorded."""
    total: dict[str, Tensor] = {}

    def add(name: str, series: list[Tensor]) -> None:
        total[name] = total.get(name, torch.zeros(2)) + sums(series)

    if stage == 3:
        buffers = [buffer for _, buffers, _ in ranks for buffer in buffers]
    else:  # the ranks' ranges side by side are a group's parameters side by side
        buffers = [
            (same[0][0], [torch.cat(parts) for parts in zip(*(grads for _, grads in same))])
            for same in zip(*(buffers for _, buffers, _ in ranks))
        ]
    for sizes, grads in buffers:
        begin = 0
        for name, size in sizes:
            add(name, [grad[begin : begin + size] for grad in grads])
            begin += size
    for _, _, rows in ranks:
        by_row: dict[int, list[Tensor]] = {}
        for ids, grads in rows:
            for row, grad in zip(ids, grads):
                by_row.setdefault(row, []).append(grad)
        for series in by_row.values():
            if len(series) > 1:
                add("tables", series)
    return {f"grad_signal/{name}": max(0.0, float(s / p)) for name, (s, p) in total.items()}


LEGS = {
    "dense ZeRO-1": ("dense", 1, [], None),
    "PKM ZeRO-3": ("pkm", 3, [], None),
    "UltraMem ZeRO-3": ("ultramem", 3, [], None),
    "UltraMem by row": ("ultramem", 3, ["memory.table_optimizer=row-sparse"], None),
    "UltraMem on the CPU": ("ultramem", 3, [], CONFIG_DIR / "ultramem_zero3_cpu_offload.json"),
}
CASES = [*itertools.product(LEGS, [1, 2]), ("MoE", 1)]
LEGS["MoE"] = ("moe", 2, [], None)


@pytest.mark.parametrize(("name", "world_size"), CASES)
def test_shares_are_those_of_the_gradients(name: str, world_size: int, tmp_path: Path) -> None:
    kind, stage, overrides, file = LEGS[name]
    leg = Leg(
        kind=kind,
        begin=0,
        end=STEPS,
        run_dir=tmp_path,
        overrides=(*overrides, "memory.stats_every=3"),
        deepspeed_file=file,
    )
    ranks = run_ranks(recorded_body, world_size, leg)
    shares = [
        {key: value for key, value in step.items() if key.startswith("grad_signal/")}
        for step in ranks[0][0]
    ]
    assert [bool(found) for found in shares] == [False, False, True] * 2
    expected = by_hand(ranks, stage)
    kinds = {"dense": {"dense"}, "moe": {"experts", "dense"}}
    present = kinds.get(kind, {"tables", "keys", "queries", "dense"})
    assert shares[-1].keys() == expected.keys() == {f"grad_signal/{k}" for k in present}
    assert shares[-1] == pytest.approx(expected, rel=1e-4, abs=1e-5)  # fp32 moments
    assert all(ranks[0][0] == other[0] for other in ranks)  # no rank has numbers of its own
    assert 0 < expected["grad_signal/dense"] < 1
