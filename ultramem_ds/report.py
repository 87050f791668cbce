"""Curves and tables of finished or running runs, as PNG and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ultramem_ds.config.load import load_run_config
from ultramem_ds.train.metrics import METRICS, VALIDATION, read_lines
from ultramem_ds.utils.files import read_json, write_text


def read_run(run_dir: Path) -> dict[str, Any]:
    """Everything a report needs of one run.

    Raises:
        ValueError: if the directory is no run.
    """
    config = load_run_config(run_dir / "config.json")
    summary_file = run_dir / "summary.json"
    return {
        "name": run_dir.name,
        "preset": config.preset,
        "metrics": read_lines(run_dir / METRICS),
        "validation": read_lines(run_dir / VALIDATION),
        "summary": read_json(summary_file) if summary_file.exists() else {},
    }


def plot_losses(runs: Sequence[dict[str, Any]], path: Path, smooth: int = 20) -> None:
    """Training loss (running mean) and validation loss of each run over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for run in runs:
        tokens = [record["tokens"] for record in run["metrics"]]
        losses = [record["loss"] for record in run["metrics"]]
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
    for axis, title in zip(axes, (f"training loss, mean of {smooth} steps", "validation loss")):
        axis.set(xlabel="tokens", ylabel="nats per token", title=title)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    temporary.replace(path)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with right-aligned columns but the first, padded to be read as text."""
    columns = list(zip(header, *rows))
    widths = [max(len(cell) for cell in column) for column in columns]

    def line(cells: Sequence[str]) -> str:
        padded = [
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)]) + "\n"


def write_report(run_dirs: Sequence[Path], output: Path) -> list[Path]:
    """Write ``losses.png`` and ``report.md`` on the given runs into ``output``."""
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
                f"{last['loss']:.4f}" if last else "-",
                f"{validation:.4f}" if validation is not None else "-",
                f"{run['summary'].get('tokens_per_s', 0):,.0f}",
            ]
        )
    header = ["run", "preset", "steps", "tokens", "training loss", "validation loss", "tokens/s"]
    plot_losses(runs, output / "losses.png")
    text = "# Runs\n\n" + markdown_table(header, rows) + "\n![losses](losses.png)\n"
    write_text(output / "report.md", text)
    return [output / "report.md", output / "losses.png"]
