"""Resident memory of one training process, phase by phase, beside what `plan` predicts.

    python benchmarks/start_memory.py [PRESET] [section.key=value ...]

Takes three steps on random tokens in one process of one thread. *peak* is the most that the process
has held so far. Then names what is mapped most, and whether torch's compiler or Triton was loaded.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import psutil

rows: list[list[str]] = []


def note(phase: str) -> None:
    """Remember what is held now and what was held at most."""
    fields = dict(
        line.split(":")
        for line in Path("/proc/self/status").read_text().splitlines()
        if ":" in line
    )
    sizes = [int(fields[key].split()[0]) / 1024 for key in ("VmRSS", "RssAnon", "VmHWM")]
    rows.append([phase, *(f"{size:.0f}" for size in sizes)])


def mapped() -> list[tuple[str, int]]:
    """Resident bytes by what is mapped, the largest first."""
    sizes: Counter[str] = Counter()
    for region in psutil.Process().memory_maps(grouped=True):
        sizes[Path(region.path).name or "anonymous"] += region.rss
    return sizes.most_common(6)


def main() -> None:
    note("Python")
    import torch

    torch.set_num_threads(1)
    note("PyTorch")
    from ultramem_ds.config.deepspeed import load_deepspeed_json
    from ultramem_ds.config.load import load_config
    from ultramem_ds.data.micro_batch import MicroBatch
    from ultramem_ds.planning.batches import plan_batches
    from ultramem_ds.planning.planner import make_plan
    from ultramem_ds.telemetry.phases import Phases
    from ultramem_ds.telemetry.report import markdown_table
    from ultramem_ds.train.engine import TrainEngine
    from ultramem_ds.zero.runtime import runtime

    note("DeepSpeed and this package")
    preset, overrides = (sys.argv[1:2] or ["ultramem-debug"])[0], sys.argv[2:]
    config = load_config(preset, ["train.micro_batch_size=8", *overrides])
    plan, batches = make_plan(config, 1).memory, plan_batches(config, 1)
    shape = (batches.micro_batch_size, config.model.seq_len + 1)

    def random_tokens() -> Iterator[MicroBatch]:
        while True:
            yield MicroBatch(torch.randint(config.model.vocab_size, shape), sample_ids=())

    with runtime() as ranks:
        json = load_deepspeed_json(None, config.model.kind)
        engine = TrainEngine(config, ranks, json, batches, Phases())
        note("model and engine")
        tokens = random_tokens()
        for step in range(3):
            engine.train_step(tokens, step)
            note(f"step {step + 1}")
    print(markdown_table(["after", "resident MiB", "of it private", "peak MiB"], rows))
    parts = ", ".join(f"{name} {size / 2**20:.0f}" for name, size in plan.parts().items())
    print(f"\nplan, MiB: {parts}")
    print("mapped, MiB: " + ", ".join(f"{name} {size / 2**20:.0f}" for name, size in mapped()))
    heavy = [name for name in ("torch._dynamo", "triton", "sympy") if name in sys.modules]
    print(f"loaded without need: {', '.join(heavy) or 'nothing'}")


if __name__ == "__main__":
    main()
