"""Checks that need live engines, run under the launcher; see ``test_state.py``.

Usage: ``... --module tests.dist.state_worker CHECK JOB.json``; rank 0 writes the job's ``out``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # before zero.Init patches the tensor constructors that it looks at
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tests.dist.series_worker import loader_of
from ultramem_ds.config.deepspeed import (CONFIG_DIR, load_deepspeed_json)
from ultramem_ds.planning.batches import plan_batches
from ultramem_ds.config.load import load_config
from ultramem_ds.config.schema import Config
from ultramem_ds.zero.runtime import Ranks, runtime
from ultramem_ds.checkpoint.directory import latest_checkpoint
from ultramem_ds.train.engine import TrainEngine
from ultramem_ds.telemetry.phases import Phases


def engine_of(config: Config, ranks: Ranks, file: Path | None = None) -> TrainEngine:
    """A fresh engine, under the kind's own DeepSpeed config unless a file is given."""
    json_values = load_deepspeed_json(file, config.model.kind)
    return TrainEngine(config, ranks, json_values, plan_batches(config, ranks.world_size), Phases())


def resumed(job: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Series of an undisturbed run, and of a new engine that loads its checkpoint half-way."""
    found = {}
    for name, overrides in job["kinds"].items():
        config = load_config(f"{name}-debug", overrides)
        run_dir = Path(job["scratch"]) / name
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        half, steps = 2, 4
        engine = engine_of(config, ranks)
        micro_batches = iter(loader_of(config, Path(job["data"]), ranks))
        undisturbed = []
        for step in range(steps):
            undisturbed.append(engine.train_step(micro_batches, step))
            if step + 1 == half:
                engine.save(run_dir, half, "fingerprint")
        engine.engine.destroy()
        again = engine_of(config, ranks)
        checkpoint = latest_checkpoint(run_dir)
        assert checkpoint is not None
        again.load(checkpoint)
        micro_batches = iter(loader_of(config, Path(job["data"]), ranks, start_step=half))
        continued = [again.train_step(micro_batches, step) for step in range(half, steps)]
        again.engine.destroy()
        found[name] = [
            [[result.loss, result.grad_norm] for result in results]
            for results in (undisturbed[half:], continued)
        ]
    return found


class LargestStorage(TorchDispatchMode):
    """Remembers the largest storage, in elements, that any operation returned a tensor on."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor) and value.device.type != "meta":
                elements = value.untyped_storage().nbytes() // value.element_size()
                self.elements = max(self.elements, elements)
        return out


def largest_allocation(job: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Largest storage while building, training two steps and saving."""
    config = load_config("ultramem-debug", job["overrides"])
    run_dir = Path(job["scratch"])
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    with LargestStorage() as largest:
        engine = engine_of(config, ranks, CONFIG_DIR / "cpu_debug.json")  # 4 MB buckets
        micro_batches = iter(loader_of(config, Path(job["data"]), ranks))
        for step in range(2):
            engine.train_step(micro_batches, step)
        engine.save(run_dir, 2, "fingerprint")
    peak = engine.comm.all_reduce_max_(torch.tensor(float(largest.elements)))
    return {"largest_elements": int(peak)}


CHECKS: dict[str, Callable[[dict[str, Any], Ranks], dict[str, Any]]] = {
    "resumed": resumed,
    "largest_allocation": largest_allocation,
}


def main() -> None:
    job = json.loads(Path(sys.argv[2]).read_text())
    with runtime() as ranks:
        found = CHECKS[sys.argv[1]](job, ranks)
        if ranks.is_main:
            Path(job["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
