"""Series and memory of the debug presets on 1, 2 and 4 ranks, as Markdown (docs/measurements.md).

python benchmarks/spine.py series --data DIR     # losses and gradient norms side by side
python benchmarks/spine.py memory --data DIR     # peak memory per rank, a table that dominates
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ultramem_ds.telemetry.report import markdown_table

ROOT = Path(__file__).resolve().parents[1]
RANKS = (1, 2, 4)


def train(preset: str, data: Path, ranks: int, overrides: list[str]) -> dict[str, Any]:
    """Metrics and summary of one short run through the launcher."""
    with tempfile.TemporaryDirectory() as scratch:
        command = ["bash", str(ROOT / "launch" / "one_node.sh"), "train", "--preset", preset]
        command += ["--data", str(data), "--run-dir", scratch, *overrides]
        command += ["train.micro_batch_size=4", "train.eval_every=0"]
        environment = {**os.environ, "NPROC": str(ranks), "PYTHON": sys.executable}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        lines = (Path(scratch) / "metrics.jsonl").read_text().splitlines()
        summary = json.loads((Path(scratch) / "summary.json").read_text())
        return {"metrics": [json.loads(line) for line in lines], "summary": summary}


def series(data: Path, steps: int) -> None:
    """One table per model kind."""
    for kind in ("dense", "pkm", "moe", "ultramem"):
        runs = [
            train(f"{kind}-debug", data, ranks, [f"train.stop_at_step={steps}"]) for ranks in RANKS
        ]
        rows = []
        for step in range(steps):
            records = [run["metrics"][step] for run in runs]
            cells = [f"{r[key]:.7f}" for key in ("loss", "grad_norm") for r in records]
            rows.append([str(step + 1), *cells])
        worst = max(
            abs(run["metrics"][s][key] / runs[0]["metrics"][s][key] - 1)
            for run in runs[1:]
            for s in range(steps)
            for key in ("loss", "grad_norm")
        )
        header = ["step", *(f"loss, {r}" for r in RANKS), *(f"grad norm, {r}" for r in RANKS)]
        print(f"{kind}-debug (largest relative difference from 1 rank: {worst:.1e})\n")
        print(markdown_table(header, rows), flush=True)


def memory(data: Path, knum: int) -> None:
    """Peak resident memory with a large table, and the part above a run with a tiny one."""
    rows = []
    for ranks in RANKS:
        peaks = []
        for size in (16, knum):
            overrides = [f"memory.knum={size}", "memory.placement=2:3", "train.stop_at_step=2"]
            run = train("ultramem-debug", data, ranks, overrides)
            peaks.append(run["summary"]["peak_memory_bytes"] / 2**20)
        above = peaks[1] - peaks[0]
        rows.append([str(ranks), *(f"{peak:,.0f}" for peak in peaks), f"{above:,.0f}"])
    shares = [float(row[3].replace(",", "")) / float(rows[0][3].replace(",", "")) for row in rows]
    for row, share in zip(rows, shares):
        row.append(f"{share:.2f}")
    header = ["ranks", "table-free MiB", f"knum {knum} MiB", "above MiB", "share of 1 rank's"]
    print(f"one fp32 table of {knum**2:,} rows x 64 = {knum**2 * 256 / 2**20:,.0f} MiB\n")
    print(markdown_table(header, rows))


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("series", "memory"))
    parser.add_argument("--data", type=Path, required=True, help="prepared data, as of make demo")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--knum", type=int, default=1024)
    arguments = parser.parse_args()
    if arguments.what == "series":
        series(arguments.data, arguments.steps)
    else:
        memory(arguments.data, arguments.knum)


if __name__ == "__main__":
    main()
