"""Loss of dense Adam on the value tables against its row-sparse forms, as Markdown.

    python benchmarks/row_sparse_loss.py --data runs/demo/data [--steps 150] [--seeds 3]

Same model, data and seeds; ``memory.table_optimizer`` alone differs. Finished runs under
``--runs`` are not repeated.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ultramem_ds.telemetry.metrics import METRICS, VALIDATION, read_lines
from ultramem_ds.telemetry.report import markdown_table

OPTIMIZERS = ("dense", "row-sparse", "row-sparse-catch-up")
LAST = 15  # steps that a training loss is averaged over


def train(run_dir: Path, optimizer: str, seed: int, args: argparse.Namespace) -> tuple[float, ...]:
    """Training loss, validation loss, and the training loss of every step."""
    if not (run_dir / "summary.json").exists():
        command = [sys.executable, "-m", "ultramem_ds", "train", "--preset", args.preset]
        command += ["--data", str(args.data), "--run-dir", str(run_dir), f"train.seed={seed}"]
        command += [f"memory.table_optimizer={optimizer}", f"train.max_steps={args.steps}"]
        command += ["train.eval_every=0", "train.save_every=0", *args.overrides]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    losses = [record["loss"] for record in read_lines(run_dir / METRICS)]
    return mean(losses[-LAST:]), read_lines(run_dir / VALIDATION)[-1]["all"], *losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="prepared data, as of make demo")
    parser.add_argument("--runs", type=Path, default=Path("runs/row-sparse-loss"))
    parser.add_argument("--preset", default="ultramem-debug")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", help="section.key=value, of all runs")
    args = parser.parse_args()
    found = {
        (optimizer, seed): train(args.runs / f"{optimizer}-seed{seed}", optimizer, seed, args)
        for seed in range(args.seeds)
        for optimizer in OPTIMIZERS
    }
    rows = []
    for optimizer in OPTIMIZERS:
        cells = [optimizer]
        for column in (0, 1):
            values = [found[optimizer, seed][column] for seed in range(args.seeds)]
            differences = [
                value - found["dense", seed][column] for seed, value in enumerate(values)
            ]
            cells += [f"{mean(values):.4f}", spread(differences)]
        largest = max(
            abs(a - b)
            for seed in range(args.seeds)
            for a, b in zip(found[optimizer, seed][2:], found["dense", seed][2:])
        )
        rows.append([*cells, f"{largest:.4f}"])
    header = ["table optimizer", f"training loss, last {LAST} steps", "minus dense"]
    header += ["validation loss", "minus dense", "largest difference of a step's loss"]
    print(markdown_table(header, rows))


def spread(values: list[float]) -> str:
    return f"{mean(values):+.4f} ± {stdev(values) if len(values) > 1 else 0.0:.4f}"


if __name__ == "__main__":
    main()
