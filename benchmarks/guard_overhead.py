"""What guards, watchdog and statistics cost: rounds with and without them, in turns, in one run.

    deepspeed --num_gpus 2 --no_local_rank --module benchmarks.guard_overhead DATA [PRESET]

A round is 50 optimizer steps. *With*: the gate before every step (``train.grad_spike=skip``), the
poisoned loss, the review of the step, the watchdog's thread, one comparison of the ranks (twice as
often as by default) and one sample of the memory layers' statistics (as by default). *Without*:
none of them. Rank 0 prints JSON: medians over rounds of the mean step, and their ratio.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ultramem_ds.config.deepspeed import load_deepspeed_json
from ultramem_ds.config.load import load_config
from ultramem_ds.data.loader import BatchLoader
from ultramem_ds.data.mixture import Mixture
from ultramem_ds.optim.decision import Decision
from ultramem_ds.planning.batches import plan_batches
from ultramem_ds.sharding.comm import Comm
from ultramem_ds.telemetry.phases import Phases
from ultramem_ds.train import engine as engine_module
from ultramem_ds.train.engine import TrainEngine
from ultramem_ds.watch.desync import DesyncGuard, digest
from ultramem_ds.watch.roster import Roster
from ultramem_ds.watch.watchdog import Watchdog
from ultramem_ds.zero.replicated import replicated
from ultramem_ds.zero.runtime import Ranks, runtime

ROUND = 50
ROUNDS = 8  # of each kind
OVERRIDES = ["train.grad_spike=skip", "train.max_steps=10000"]


class NoGate:
    """Takes DeepSpeed's word for every step."""

    def __init__(self, engine: TrainEngine) -> None:
        self.engine = engine.engine

    def take_decision(self) -> Decision:
        return Decision(float(self.engine.get_global_grad_norm()), True, 1.0)


class Switch:
    """Turns everything on and off on a live engine."""

    def __init__(self, engine: TrainEngine, run_dir: Path, ranks: Ranks) -> None:
        self.engine, self.run_dir, self.ranks = engine, run_dir, ranks
        zero = engine.engine.optimizer
        names = ("_get_norm_groups", "scaled_global_norm", "check_overflow")
        self.hooks = {name: vars(zero)[name] for name in names if name in vars(zero)}
        self.zero, self.gate = zero, engine.gate
        self.poison = engine_module.poison_unless_finite
        self.stats_every = engine.statistics.every
        every = engine.config.train.desync_every
        self.desync = DesyncGuard(
            engine.comm, ranks.device, lambda: replicated(engine.model), every
        )

    @contextlib.contextmanager
    def set(self, on: bool) -> Any:
        for name, hook in self.hooks.items():
            if on:
                setattr(self.zero, name, hook)
            else:
                vars(self.zero).pop(name, None)
        if hasattr(self.zero, "check_grad_overflow"):
            self.zero.check_grad_overflow = on
        self.engine.gate = self.gate if on else NoGate(self.engine)  # type: ignore[assignment]
        engine_module.poison_unless_finite = self.poison if on else lambda loss: loss
        self.engine.statistics.every = self.stats_every if on else 0
        self.engine.gradient_statistics.every = self.stats_every if on else 0
        if on:
            with Watchdog(self.run_dir, self.ranks, self.engine.phases, 600.0):
                yield
        else:
            yield


def main() -> None:
    preset = sys.argv[2] if len(sys.argv) > 2 else "ultramem-debug"
    config = load_config(preset, OVERRIDES)
    with runtime() as ranks, tempfile.TemporaryDirectory() as scratch:
        run_dir = Path(scratch)
        Roster.reset(run_dir)
        batches = plan_batches(config, ranks.world_size)
        json_values = load_deepspeed_json(None, config.model.kind)
        engine = TrainEngine(config, ranks, json_values, batches, Phases())
        mixture = Mixture(
            Path(sys.argv[1]), "train", seq_len=config.model.seq_len, weights={}, seed=0
        )
        loader = BatchLoader(
            mixture,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=batches.micro_batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
        switch = Switch(engine, run_dir, ranks)
        micro_batches = iter(loader)
        step = 0
        times: dict[bool, list[float]] = {True: [], False: []}
        for number in range(2 * ROUNDS + 2):
            on = number % 2 == 1
            Comm().barrier()
            with switch.set(on):
                begin = time.perf_counter()
                for _ in range(ROUND):
                    engine.phases.step = step + 1
                    result = engine.train_step(micro_batches, step)
                    step += 1
                    if on:
                        engine.guard.review(step, result, ((0, 1),))
                        engine.guard.check()
                if on:
                    items = {"step": step, "guard": digest(engine.guard.state())}
                    switch.desync.compare(items)
                elapsed = (time.perf_counter() - begin) / ROUND
            if number >= 2:  # the first two warm up
                times[on].append(1e3 * elapsed)
        loader.close()
        if ranks.is_main:
            with_ms, without_ms = (statistics.median(times[on]) for on in (True, False))
            record = {
                "preset": preset,
                "ranks": ranks.world_size,
                "with_ms": round(with_ms, 2),
                "without_ms": round(without_ms, 2),
                "overhead": round(with_ms / without_ms - 1, 4),
                "rounds_ms": {str(k): [round(t, 2) for t in v] for k, v in times.items()},
            }
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
