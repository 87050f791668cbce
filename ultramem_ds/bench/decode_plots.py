"""Plots of ``bench decode`` in the manner of the paper's Figures 1b, 1c, 6c and 7."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

_STYLE: dict[str, dict[str, Any]] = {
    "dense": {"color": "tab:gray", "marker": "o"},
    "pkm": {"color": "tab:green", "marker": "^"},
    "moe": {"color": "tab:orange", "marker": "s"},
    "ultramem": {"color": "tab:blue", "marker": "D"},
}
Row = dict[str, Any]


def plot_decode(document: dict[str, Any], directory: Path) -> list[Path]:
    """Write one PNG per KV mode (time and bytes over batch), and one of growth if measured."""
    directory.mkdir(parents=True, exist_ok=True)
    size = document["config"]["size"]
    paths = []
    for mode in document["config"]["kv_modes"]:
        rows = [row for row in document["rows"] if row["kv_mode"] == mode]
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
        _lines(left, rows, lambda row: row["time_ms"], spread=True)
        left.set_ylabel("time of a decode step, ms")
        _lines(right, rows, lambda row: row["bytes_read"] / 1e9)
        formulas = [row for row in document["formula_rows"] if row["kv_mode"] == mode]
        _formula(left, formulas, lambda row: row["roofline_ms"])
        _formula(right, formulas, lambda row: row["bytes_read"] / 1e9)
        right.set_ylabel("bytes read by a step, GB")
        for axes in (left, right):
            axes.set(xlabel="batch", xscale="log", yscale="log")
            axes.xaxis.set_major_formatter("{x:.0f}")
            axes.set_xticks(sorted({row["batch"] for row in formulas}), minor=False)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_minor_formatter("{x:g}")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.legend()
        figure.suptitle(f"{size}, keys and values: {mode} (Figures 1b, 1c, 7)")
        paths.append(_save(figure, directory / f"decode-{size}-kv-{mode}.png"))
    if document.get("growth_rows"):
        paths.append(_plot_growth(document["growth_rows"], directory / f"growth-{size}.png"))
    return paths


def _formula(axes: Axes, rows: list[Row], value: Callable[[Row], float]) -> None:
    """Dotted, beside what was measured: at the rates of the run's own probes."""
    for kind, style in _STYLE.items():
        mine = sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["batch"])
        points = [value(row) for row in mine]
        axes.plot([row["batch"] for row in mine], points, color=style["color"], linestyle=":")


def _lines(
    axes: Axes, rows: list[Row], value: Callable[[Row], float], spread: bool = False
) -> None:
    for kind, style in _STYLE.items():
        mine = sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["batch"])
        batches = [row["batch"] for row in mine]
        axes.plot(batches, [value(row) for row in mine], label=kind, **style)
        if spread:
            low, high = [row["low_ms"] for row in mine], [row["high_ms"] for row in mine]
            axes.fill_between(batches, low, high, color=style["color"], alpha=0.2)


def _plot_growth(rows: list[Row], path: Path) -> Path:
    """Time over sparse size relative to the smallest, at the largest batch measured."""
    batch = max(row["batch"] for row in rows)
    figure, axes = plt.subplots(figsize=(5, 4))
    for kind in ("moe", "ultramem"):
        mine = [row for row in rows if row["kind"] == kind and row["batch"] == batch]
        mine.sort(key=lambda row: row["experts_or_rows"])
        growth = [row["experts_or_rows"] / mine[0]["experts_or_rows"] for row in mine]
        times = [row["time_ms"] for row in mine]
        axes.plot(growth, times, label=kind, **_STYLE[kind])
    axes.set(
        xlabel="sparse parameters, relative",
        ylabel="time of a decode step, ms",
        xscale="log",
        ylim=(0, None),
        title=f"growth at batch {batch} (Figure 6c)",
    )
    axes.legend()
    return _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
