"""Results of benchmark tasks through training (the paper's Figure 11), drawn and tabled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ultramem_ds.telemetry.markdown import markdown_table

TASKS_PLOT = "tasks.png"
_COLUMNS = 3  # of small plots


def task_names(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Every ``task/metric`` that some run has, in order of appearance."""
    return list(dict.fromkeys(name for run in runs for r in run["tasks"] for name in r["tasks"]))


def plot_tasks(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """One small plot for each ``task/metric``: its value over tokens, a line for each run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = task_names(runs)
    num_rows = -(-len(names) // _COLUMNS)
    figure, axes = plt.subplots(
        num_rows, _COLUMNS, figsize=(12, 3.2 * num_rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names):
        for run in runs:
            at_step = {record["step"]: record["tokens"] for record in run["metrics"]}
            points = [
                (at_step[record["step"]], record["tasks"][name])
                for record in run["tasks"]
                if record["step"] in at_step and name in record["tasks"]
            ]
            if points:
                axis.plot(*zip(*points), marker="o", label=run["name"])
        axis.set(xlabel="tokens", title=name)
        axis.grid(alpha=0.3)
        axis.legend()
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    temporary.replace(path)


def tasks_table(runs: Sequence[dict[str, Any]]) -> str:
    """The last result of each run."""
    names = task_names(runs)
    rows = []
    for run in runs:
        step, found = 0, dict[str, float]()
        for record in run["tasks"]:
            step, found = record["step"], record["tasks"]
        cells = [f"{found[name]:.4f}" if name in found else "-" for name in names]
        rows.append([run["name"], f"{step}", *cells])
    return markdown_table(["run", "step", *names], rows)
