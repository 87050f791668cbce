"""``plan`` against processes that train, and that nothing large is held twice."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.launching import run_verb
from ultramem_ds.config.deepspeed import load_deepspeed_json
from ultramem_ds.config.load import load_config
from ultramem_ds.data.micro_batch import MicroBatch
from ultramem_ds.planning.batches import plan_batches
from ultramem_ds.planning.planner import make_plan
from ultramem_ds.telemetry.metrics import read_lines
from ultramem_ds.telemetry.phases import Phases
from ultramem_ds.testing.distributed import run_ranks
from ultramem_ds.train.engine import TrainEngine
from ultramem_ds.zero.deepspeed_import import deepspeed
from ultramem_ds.zero.runtime import Ranks

pytestmark = pytest.mark.dist

BATCH = ("train.global_batch_size=16", "train.micro_batch_size=8")
ROWS = 192 * 192


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [0, 2])
@pytest.mark.parametrize("kind", ["dense", "moe", "pkm", "ultramem"])
def test_a_rank_holds_what_is_planned(
    prepared: Path, tmp_path: Path, kind: str, nproc: int
) -> None:
    """The debug presets as they are, from start to validation: resident memory at its peak."""
    overrides = [*BATCH, "train.max_steps=4", "train.eval_sequences=8"]
    words = ["train", "--preset", f"{kind}-debug", "--data", str(prepared)]
    result = run_verb(*words, "--run-dir", str(tmp_path / "run"), *overrides, nproc=nproc)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    measured = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["peak_memory_bytes"]
    planned = make_plan(load_config(f"{kind}-debug", overrides), max(nproc, 1)).memory
    assert planned.total == pytest.approx(measured, rel=0.1), planned.parts()


def large_tensors(rank: int, world_size: int, overrides: list[str]) -> list[int]:
    """Bytes of what is held at once after building, without buffers that nobody has written."""
    deepspeed.init_distributed("gloo", verbose=False)
    config = load_config("ultramem-debug", [*BATCH, *overrides])
    batches = plan_batches(config, world_size)
    ranks = Ranks(rank, world_size, rank, torch.device("cpu"))
    json = load_deepspeed_json(None, "ultramem")
    engine = TrainEngine(config, ranks, json, batches, Phases())
    storages: dict[int, int] = {}
    found: Any
    for found in gc.get_objects():
        if issubclass(type(found), torch.Tensor) and found.device.type == "cpu":
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    width = 2 if config.train.precision == "bf16" else 4
    bucket = width * json["zero_optimization"]["reduce_bucket_size"]
    assert engine.tables is not None
    return sorted(size for size in storages.values() if 1 << 20 < size != bucket)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tables_are_held_once(precision: str) -> None:
    """Weights and gradients each in one buffer, and masters only in bf16; no moments yet."""
    sizes = run_ranks(large_tensors, 1, [f"train.precision={precision}"])[0]
    elements = sum(sizes) / (4 + 4 if precision == "fp32" else 2 + 4 + 4)
    # The rest of the model: attention, MLPs, embedding and head, queries and keys, some gathered.
    tables = 2 * ROWS * 64
    assert tables < elements < tables + 2.5e6


def copied_gradients(rank: int, world_size: int, overrides: list[str]) -> tuple[int, int]:
    """Gradients that AdamW was handed at a step: how many, and how many were copies."""
    deepspeed.init_distributed("gloo", verbose=False)
    config = load_config("ultramem-debug", [*BATCH, *overrides])
    ranks = Ranks(rank, world_size, rank, torch.device("cpu"))
    json = load_deepspeed_json(None, "ultramem")
    engine = TrainEngine(config, ranks, json, plan_batches(config, world_size), Phases())
    zero = engine.engine.optimizer
    buffer = zero.grad_partitions_flat_buffer.untyped_storage().data_ptr()
    handed: list[int] = []
    zero.optimizer.register_step_pre_hook(
        lambda *_: handed.extend(
            group["params"][0].grad.untyped_storage().data_ptr()
            for group in zero.optimizer.param_groups
            if group["params"] and group["params"][0].grad is not None
        )
    )
    tokens_BS1 = torch.arange(1032).reshape(8, 129)
    batch = MicroBatch(tokens=tokens_BS1, sample_ids=())
    for step in range(2):
        engine.train_step(iter([batch] * 64), step)
    return len(handed), sum(storage != buffer for storage in handed)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_step_reads_gradients_where_they_were_summed(precision: str) -> None:
    """No flat copy of a sub-group's gradients, which for tables would be all of them."""
    for handed, copied in run_ranks(copied_gradients, 2, [f"train.precision={precision}"]):
        assert handed > 2 and not copied
