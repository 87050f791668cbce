"""Runs of a few optimizer steps of tiny models on ranks, for tests of checkpoints and curves.

The batches depend on the step alone, so that every world size sees the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ultramem_ds.config.deepspeed import (load_deepspeed_json)
from ultramem_ds.planning.batches import plan_batches
from ultramem_ds.config.load import load_config
from ultramem_ds.config.schema import Config
from ultramem_ds.data.micro_batch import MicroBatch
from ultramem_ds.zero.deepspeed_import import deepspeed
from ultramem_ds.zero.runtime import Ranks
from ultramem_ds.checkpoint import directory as checkpoints
from ultramem_ds.train.engine import TrainEngine
from ultramem_ds.telemetry.phases import Phases

SHARED = [
    "model.hidden_size=32",
    "model.inner_size=64",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.vocab_size=64",
    "model.seq_len=16",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.max_steps=8",
    "optim.clip_grad=0.5",  # below the norms met, so that clipping takes part
]
# 27 * 27 = 729 rows: odd, so that 2 and 4 ranks pad differently.
MEMORY = [
    "memory.wire_gb_per_s=1",  # as configured, so that partition=auto is the same on any machine
    "memory.memory_gb_per_s=10",
    "memory.placement=1:2",
    "memory.knum=27",
    "memory.value_dim=16",
    "memory.kdim=8",
    "memory.top_m=4",
]
KINDS = {
    "dense": ["dense-debug", *SHARED],
    "pkm": ["pkm-debug", *SHARED, *MEMORY, "memory.value_dim=32"],
    "ultramem": ["ultramem-debug", *SHARED, *MEMORY],
    "moe": ["moe-debug", *SHARED, "moe.num_experts=4"],
}


@dataclass(frozen=True, kw_only=True)
class Leg:
    """One stretch of a run: load, train from step ``begin`` to ``end``, save.

    Attributes:
        kind: key of ``KINDS``.
        run_dir: where checkpoints lie; the latest is loaded if ``begin`` is not 0.
        overrides: further ``section.key=value``.
        deepspeed_file: DeepSpeed JSON; None is the kind's own.
    """

    kind: str
    begin: int
    end: int
    run_dir: Path
    overrides: tuple[str, ...] = ()
    deepspeed_file: Path | None = None
    save: bool = True

    @property
    def config(self) -> Config:
        """The resolved configuration."""
        preset, *shared = KINDS[self.kind]
        return load_config(preset, [*shared, *self.overrides])


def micro_batches(config: Config, ranks: Ranks, begin: int) -> Iterator[MicroBatch]:
    """This rank's share of each step's sequences, random tokens seeded by the step."""
    size, length = config.train.global_batch_size, config.model.seq_len
    micro = config.train.micro_batch_size
    assert isinstance(micro, int)
    step = begin
    while True:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(config.model.vocab_size, (size, length + 1), generator=generator)
        mine = tokens.chunk(ranks.world_size)[ranks.rank]
        for part in mine.split(micro):
            yield MicroBatch(tokens=part, sample_ids=())
        step += 1


def build_engine(leg: Leg, rank: int, world_size: int) -> TrainEngine:
    """The engine of a leg, nothing loaded."""
    backend = torch.distributed.get_backend()
    deepspeed.init_distributed(backend, verbose=False)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    ranks = Ranks(rank, world_size, rank, device)
    json = load_deepspeed_json(leg.deepspeed_file, leg.config.model.kind)
    return TrainEngine(leg.config, ranks, json, plan_batches(leg.config, world_size), Phases())


def run_leg(leg: Leg, rank: int, world_size: int) -> list[tuple[float, float]]:
    """(loss, grad_norm) of every step of the leg."""
    engine = build_engine(leg, rank, world_size)
    if leg.begin:
        latest = checkpoints.latest_checkpoint(leg.run_dir)
        assert latest is not None
        engine.load(latest)
    batches = micro_batches(leg.config, engine.ranks, leg.begin)
    series = []
    for step in range(leg.begin, leg.end):
        result = engine.train_step(batches, step)
        series.append((result.loss, result.grad_norm))
    if leg.save:
        engine.save(leg.run_dir, leg.end, "test data")
    engine.engine.destroy()
    return series


def run_legs(rank: int, world_size: int, legs: list[Leg]) -> list[Any]:
    """Body for ``run_ranks``: the series of each leg, one process start for all."""
    return [run_leg(leg, rank, world_size) for leg in legs]
