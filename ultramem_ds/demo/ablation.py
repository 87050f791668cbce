"""``make ablation``: Table 2 of the paper at debug scale, on the demo's corpus.

The rows are the presets ``ablation-00-pkm`` ... ``ablation-11-query-conv``, widths divided by
8 and tables by 40, several seeds, side by side with the paper's differences. Two more rows
compare the candidate searches beyond the paper. Finished runs are skipped, interrupted ones resume.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from ultramem_ds.config.load import load_config, to_dict
from ultramem_ds.config.presets import ABLATION_ROWS
from ultramem_ds.demo.__main__ import ROOT, prepare_data
from ultramem_ds.telemetry.metrics import METRICS, VALIDATION, read_lines
from ultramem_ds.telemetry.report import markdown_table
from ultramem_ds.utils.files import write_text

# Table 2: training and validation loss of each row at 151M and 500B tokens.
PAPER = (
    (2.604, 2.828),
    (2.570, 2.822),
    (2.556, 2.800),
    (2.560, 2.803),
    (2.554, 2.788),
    (2.553, 2.789),
    (2.544, 2.772),
    (2.538, 2.764),
    (2.521, 2.761),
    (2.518, 2.758),
    (2.494, 2.736),
    (2.493, 2.736),
)
_WIDTH = 8  # divides hidden size, value width and kdim
_KNUM = 1000 / 160  # divides knum
_SPANS = {"6:6": "2:2", "3:5/6:8/9:11": "1:2/2:3/3:4"}


@dataclass(frozen=True)
class Row:
    """One line of the table: a preset at debug scale."""

    name: str
    preset: str
    overrides: tuple[str, ...]
    paper: tuple[float, float] | None = None


def debug_scale(preset: str) -> tuple[str, ...]:
    """Overrides that bring an ablation preset to debug scale; what the row switches stays."""
    small = to_dict(load_config("ultramem-debug"))
    memory = load_config(preset).memory
    overrides = [f"model.{key}={value}" for key, value in small["model"].items() if key != "kind"]
    overrides += [
        f"memory.placement={_SPANS[memory.placement]}",
        f"memory.knum={round(memory.knum / _KNUM)}",
        f"memory.kdim={memory.kdim // _WIDTH}",
        f"memory.value_dim={memory.value_dim // _WIDTH}",
        f"optim.lr={small['optim']['lr']}",
        f"optim.value_lr={small['optim']['value_lr']}",
        "train.global_batch_size=16",
        "train.micro_batch_size=16",
        "train.precision=fp32",
        "train.save_every=0",
        "train.eval_every=0",
        "train.eval_sequences=256",
        "memory.stats_every=0",
    ]
    return tuple(overrides)


def table_rows() -> list[Row]:
    """Table 2's rows, then the candidate searches on the last of them."""
    rows = [
        Row(name.removeprefix("ablation-"), name, debug_scale(name), PAPER[i])
        for i, (name, _) in enumerate(ABLATION_ROWS)
    ]
    last = rows[-1]
    for mode in ("two-sided", "two-sided-full"):
        rows.append(Row(mode, last.preset, (*last.overrides, f"memory.candidates={mode}")))
    return rows


def train_row(row: Row, seed: int, steps: int, data: Path) -> tuple[float, float]:
    """Train one row with one seed; mean training loss of the last tenth, and validation loss."""
    run_dir = ROOT / "ablation" / f"{row.name}-seed{seed}-steps{steps}"
    command = [sys.executable, "-m", "ultramem_ds", "train", "--preset", row.preset]
    command += ["--data", str(data), "--run-dir", str(run_dir), *row.overrides]
    command += [f"train.max_steps={steps}", f"train.seed={seed}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / "console.log", "a") as log:
        code = subprocess.run(command, env=environment, stdout=log, stderr=log).returncode
    if code:
        raise RuntimeError(f"{run_dir} failed with exit code {code}; see its console.log")
    losses = [record["loss"] for record in read_lines(run_dir / METRICS)]
    validation = read_lines(run_dir / VALIDATION)[-1]["all"]
    print(f"{run_dir.name}: validation loss {validation:.4f}", flush=True)
    return mean(losses[-max(1, steps // 10) :]), validation


def _cell(values: Sequence[float]) -> str:
    spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{mean(values):.4f}{spread}"


def write_table(rows: Sequence[Row], results: dict[str, list[tuple[float, float]]]) -> str:
    """Markdown: losses, difference from the row before, and the paper's."""
    lines = []
    before: Row | None = None
    for row in rows:
        training, validation = zip(*results[row.name])
        reference = before if row.paper is not None else rows[len(PAPER) - 1]
        delta = "-"
        if reference is not None:
            differences = [a[1] - b[1] for a, b in zip(results[row.name], results[reference.name])]
            delta = f"{mean(differences):+.4f}"
        paper = paper_delta = "-"
        if row.paper is not None:
            paper = f"{row.paper[1]:.3f}"
            if before is not None and before.paper is not None:
                paper_delta = f"{row.paper[1] - before.paper[1]:+.3f}"
        lines.append([row.name, _cell(training), _cell(validation), delta, paper, paper_delta])
        before = row
    header = ["row", "training loss", "validation loss", "change", "paper", "paper's change"]
    return markdown_table(header, lines)


def main() -> None:
    """Run all rows with all seeds, two at a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="runs per row")
    parser.add_argument(
        "--candidate-seeds", type=int, default=3, help="at least so many for the candidate searches"
    )
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps per run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--data", type=Path, help="prepared data; default: the demo's")
    arguments = parser.parse_args()
    data = arguments.data or prepare_data()
    rows = table_rows()
    seeds = {row.name: arguments.seeds for row in rows}
    for row in rows[len(PAPER) - 1 :]:  # the last row of Table 2 and the candidate searches on it
        seeds[row.name] = max(arguments.seeds, arguments.candidate_seeds)
    work = [
        (row, seed) for seed in range(max(seeds.values())) for row in rows if seed < seeds[row.name]
    ]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = pool.map(lambda job: train_row(job[0], job[1], arguments.steps, data), work)
        results: dict[str, list[tuple[float, float]]] = {row.name: [] for row in rows}
        for (row, _), losses in zip(work, found):
            results[row.name].append(losses)
    table = write_table(rows, results)
    write_text(ROOT / "ablation" / "table.md", table)
    (ROOT / "ablation" / "results.json").write_text(json.dumps(results, indent=2))
    print(table)


if __name__ == "__main__":
    main()
