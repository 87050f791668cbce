"""Train several small models, one after the other, on the ranks that the launcher started.

Usage: ``... --module tests.dist.series_worker JOBS.json``; rank 0 writes ``OUT`` named in it.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from ultramem_ds.config.deepspeed import (load_deepspeed_json)
from ultramem_ds.planning.batches import plan_batches
from ultramem_ds.config.load import load_config
from ultramem_ds.config.schema import Config
from ultramem_ds.data.loader import BatchLoader
from ultramem_ds.data.mixture import Mixture
from ultramem_ds.model.compiling import compile_blocks
from ultramem_ds.zero import parallelize
from ultramem_ds.zero.runtime import Ranks, runtime
from ultramem_ds.train.engine import TrainEngine
from ultramem_ds.telemetry.phases import Phases


def loader_of(config: Config, data: Path, ranks: Ranks, start_step: int = 0) -> BatchLoader:
    """This rank's micro-batches, from an optimizer step on."""
    mixture = Mixture(
        data, "train", seq_len=config.model.seq_len, weights={}, seed=config.train.seed
    )
    return BatchLoader(
        mixture,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=plan_batches(config, ranks.world_size).micro_batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        start_step=start_step,
        num_workers=0,
    )


def series(job: dict[str, Any], data: Path, ranks: Ranks) -> list[list[float]]:
    """``[loss, grad_norm, grad_norm of the tables or 0]`` per optimizer step."""
    config = load_config(job["preset"], job["overrides"])
    # Tracing and autograd as with inductor, whose code generation takes minutes.
    parallelize.compile_blocks = partial(compile_blocks, backend=job.get("backend", "aot_eager"))
    batches = plan_batches(config, ranks.world_size)
    file = Path(job["deepspeed"]) if job.get("deepspeed") else None
    engine = TrainEngine(config, ranks, load_deepspeed_json(file, config.model.kind), batches, Phases())
    loader = loader_of(config, data, ranks)
    micro_batches = iter(loader)
    found = []
    for step in range(job["steps"]):
        result = engine.train_step(micro_batches, step)
        tables = engine.telemetry.read(1.0).get("grad_norm_tables", 0.0)
        found.append([result.loss, result.grad_norm, tables])
    loader.close()
    return found


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text())
    with runtime() as ranks:
        found = {name: series(job, Path(job.get("data", jobs["data"])), ranks) for name, job in jobs["jobs"].items()}
        if ranks.is_main:
            Path(f"{jobs['out']}-{ranks.world_size}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
