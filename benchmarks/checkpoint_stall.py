"""How long training stands still for a checkpoint: written in the foreground and in the background.

One process, a model that is nearly all value table. Each way saves a few times, some steps apart;
printed are the time of the call that saves, the slowest step until the files are published, and the
time until then. The first save in the background also allocates the copy in host memory.

Usage: python benchmarks/checkpoint_stall.py [--knum 1024] [--saves 4] [--directory DIR] [--json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ultramem_ds.checkpoint.directory import checkpoints_dir
from ultramem_ds.config.deepspeed import load_deepspeed_json
from ultramem_ds.config.load import load_config
from ultramem_ds.data.micro_batch import MicroBatch
from ultramem_ds.planning.batches import plan_batches
from ultramem_ds.telemetry.phases import Phases
from ultramem_ds.train.engine import TrainEngine
from ultramem_ds.zero.runtime import Ranks, runtime

STEPS_BETWEEN = 3


def measure(
    background: bool, knum: int, saves: int, directory: Path, ranks: Ranks
) -> dict[str, Any]:
    """Train and save; times in seconds."""
    config = load_config(
        "ultramem-debug",
        [
            f"memory.knum={knum}",
            "memory.value_dim=64",
            "memory.placement=1:2",
            "train.global_batch_size=4",
            "train.micro_batch_size=4",
            "train.max_steps=1000",
            "train.keep_last=1",
            f"train.background_save={str(background).lower()}",
        ],
    )
    deepspeed_json = load_deepspeed_json(None, config.model.kind)
    engine = TrainEngine(config, ranks, deepspeed_json, plan_batches(config, 1), Phases())
    tokens = torch.randint(config.model.vocab_size, (4, config.model.seq_len + 1))
    batch = MicroBatch(tokens=tokens, sample_ids=(0, 1, 2, 3))
    done = 0

    def step() -> float:
        nonlocal done
        begin = time.perf_counter()
        engine.train_step(iter([batch]), done)
        engine.advance_save()
        done += 1
        return time.perf_counter() - begin

    undisturbed_s = statistics.median(step() for _ in range(5))
    stalls_s, slowest_s, until_s = [], [], []
    for _ in range(saves):
        begin = time.perf_counter()
        engine.save(directory, done, "benchmark")
        stalls_s.append(time.perf_counter() - begin)
        steps_s = [step()]
        while engine.saver.in_progress:
            steps_s.append(step())
        until_s.append(time.perf_counter() - begin)
        slowest_s.append(max(steps_s))
        for _ in range(STEPS_BETWEEN):
            step()
    latest = max(checkpoints_dir(directory).glob("step-*"))
    size = sum(path.stat().st_size for path in latest.iterdir())
    engine.engine.destroy()
    return {
        "variant": "background" if background else "foreground",
        "checkpoint_bytes": size,
        "first_stall_s": stalls_s[0],
        "stall_s": statistics.median(stalls_s[1:] or stalls_s),
        "step_s": undisturbed_s,
        "slowest_step_s": statistics.median(slowest_s),
        "published_after_s": statistics.median(until_s),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--knum", type=int, default=1024, help="keys per side: knum^2 rows of 64")
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--directory", type=Path, help="where to write; default: a temporary one")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    with contextlib.redirect_stdout(sys.stderr), runtime() as ranks:
        for background in (False, True):
            directory = Path(tempfile.mkdtemp(prefix="stall-", dir=arguments.directory))
            try:
                rows.append(measure(background, arguments.knum, arguments.saves, directory, ranks))
            finally:
                shutil.rmtree(directory)
    if arguments.json:
        print(json.dumps({"rows": rows, "torch": torch.__version__, "knum": arguments.knum}))
        return
    print(f"checkpoint of {rows[0]['checkpoint_bytes'] / 1e6:,.0f} MB; seconds")
    columns = ["first_stall_s", "stall_s", "step_s", "slowest_step_s", "published_after_s"]
    print(" " * 12 + "".join(f"{name:>19}" for name in columns))
    for row in rows:
        print(f"{row['variant']:<12}" + "".join(f"{row[name]:>19.3f}" for name in columns))


if __name__ == "__main__":
    main()
