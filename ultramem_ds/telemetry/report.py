"""Curves and tables of finished or running runs, as PNG and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

from ultramem_ds.config.load import load_run_config
from ultramem_ds.telemetry.markdown import markdown_table
from ultramem_ds.telemetry.metrics import METRICS, VALIDATION, read_lines
from ultramem_ds.telemetry.task_curves import TASKS_PLOT, plot_tasks, tasks_table
from ultramem_ds.utils.files import read_json, write_text

# In the order of a step.
PHASES = ("data", "forward", "lookup", "backward", "optimizer", "other")


def read_run(run_dir: Path) -> dict[str, Any]:
    """Everything a report needs of one run.

    Raises:
        ValueError: if the directory is no run.
    """
    config = load_run_config(run_dir / "config.json")
    summary_file = run_dir / "summary.json"
    validation = read_lines(run_dir / VALIDATION)
    return {
        "name": run_dir.name,
        "preset": config.preset,
        "metrics": read_lines(run_dir / METRICS),
        "validation": [record for record in validation if "all" in record],
        "tasks": [record for record in validation if "tasks" in record],
        "summary": read_json(summary_file) if summary_file.exists() else {},
    }


Curves: TypeAlias = Mapping[str, Sequence[tuple[float, float]]]  # by name, (tokens, loss)


def plot_losses(
    runs: Sequence[dict[str, Any]],
    path: Path,
    smooth: int = 20,
    beside: tuple[str, Curves] | None = None,
) -> None:
    """Training loss (running mean) and validation loss of each run over tokens.

    Args:
        runs: as :func:`read_run` returned them.
        path: of the PNG.
        smooth: steps of the running mean.
        beside: title and curves of a third panel.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = [f"training loss, mean of {smooth} steps", "validation loss"]
    titles += [] if beside is None else [beside[0]]
    figure, axes = plt.subplots(
        1, len(titles), figsize=(6 * len(titles), 4.5), layout="constrained"
    )
    for name, points in ({} if beside is None else beside[1]).items():
        axes[2].plot(*zip(*points), marker="o", label=name)
    for run in runs:
        # A skipped step's loss may be null: no number.
        good = [record for record in run["metrics"] if record["loss"] is not None]
        tokens = [record["tokens"] for record in good]
        losses = [record["loss"] for record in good]
        if not tokens:
            continue
        mean = [
            sum(losses[max(0, i - smooth + 1) : i + 1]) / min(smooth, i + 1)
            for i in range(len(losses))
        ]
        axes[0].plot(tokens, mean, label=run["name"])
        at_step = {record["step"]: record["tokens"] for record in run["metrics"]}
        points = [(at_step[v["step"]], v["all"]) for v in run["validation"] if v["step"] in at_step]
        if points:
            axes[1].plot(*zip(*points), marker="o", label=run["name"])
    for axis, title in zip(axes, titles):
        axis.set(xlabel="tokens", ylabel="nats per token", title=title)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    temporary.replace(path)


def median_phases_ms(run: dict[str, Any]) -> dict[str, float]:
    """Median milliseconds of each phase over the steps of a run; a phase that is absent took 0."""
    names = sorted(
        {key for record in run["metrics"] for key in record if key.startswith("time_s/")}
    )
    return {
        name.removeprefix("time_s/"): 1e3 * median(r.get(name, 0.0) for r in run["metrics"])
        for name in names
    }


def plot_speed(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Each run's median step cut into phases, and its tokens per second over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    phases = [median_phases_ms(run) for run in runs]
    left = [0.0] * len(runs)
    for name in PHASES:
        widths = [found.get(name, 0.0) for found in phases]
        axes[0].barh([run["name"] for run in runs], widths, left=left, label=name)
        left = [a + b for a, b in zip(left, widths)]
    axes[0].set(xlabel="ms", title="median step by phase, rank 0")
    axes[0].invert_yaxis()
    axes[0].legend()
    for run in runs:
        steps = [record["step"] for record in run["metrics"]]
        axes[1].plot(steps, [r["tokens_per_s"] for r in run["metrics"]], label=run["name"])
    axes[1].set(xlabel="step", ylabel="tokens/s", title="throughput")
    axes[1].set_ylim(bottom=0)
    axes[1].grid(alpha=0.3)
    axes[1].legend()
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    temporary.replace(path)


def write_report(run_dirs: Sequence[Path], output: Path) -> list[Path]:
    """Write ``losses.png``, ``speed.png`` and ``report.md`` on the given runs into ``output``."""
    runs = [read_run(path) for path in run_dirs]
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; name a directory")
    output.mkdir(parents=True, exist_ok=True)
    rows = []
    for run in runs:
        last = run["metrics"][-1] if run["metrics"] else {}
        validation = run["validation"][-1]["all"] if run["validation"] else None
        rows.append(
            [
                run["name"],
                run["preset"],
                f"{last.get('step', 0)}",
                f"{last.get('tokens', 0):,}",
                _number(last.get("loss"), ".4f"),
                _number(validation, ".4f"),
                _number(_median(run, "tokens_per_s"), ",.0f"),
                _number(_median(run, "mfu"), ".1%"),
                _number(_largest(run, "peak_memory_bytes", 1e-6), ",.0f"),
            ]
        )
    header = ["run", "preset", "steps", "tokens", "training loss", "validation loss", "tokens/s"]
    plot_losses(runs, output / "losses.png")
    plot_speed(runs, output / "speed.png")
    times = [
        [run["name"], *(f"{median_phases_ms(run).get(p, 0):,.1f}" for p in PHASES)] for run in runs
    ]
    text = "\n".join(
        [
            "# Runs\n",
            markdown_table([*header, "utilisation", "peak MB per rank"], rows),
            "Tokens per second, utilisation of the peak FLOP/s and the times below are medians.\n",
            "![losses](losses.png)\n",
            "## Time of a step, ms on rank 0\n",
            markdown_table(["run", *PHASES], times),
            "![speed](speed.png)\n",
        ]
    )
    written = [output / "report.md", output / "losses.png", output / "speed.png"]
    if any(run["tasks"] for run in runs):
        plot_tasks(runs, output / TASKS_PLOT)
        text += "\n".join(
            ["\n## Benchmark tasks\n", tasks_table(runs), f"![tasks]({TASKS_PLOT})\n"]
        )
        written.append(output / TASKS_PLOT)
    write_text(output / "report.md", text)
    return written


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _median(run: dict[str, Any], key: str) -> float | None:
    values = [record[key] for record in run["metrics"] if record.get(key) is not None]
    return median(values) if values else None


def _largest(run: dict[str, Any], key: str, factor: float) -> float | None:
    """Over the steps, and over all ranks where the run has ended."""
    sources = [*run["metrics"], run["summary"]]
    return max((factor * r[key] for r in sources if key in r), default=None)
