"""The figures of a study, in the manner of the paper's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from ultramem_ds.study.expand import Line
from ultramem_ds.study.fits import fit_line, fit_power_law
from ultramem_ds.study.paper import compute_points
from ultramem_ds.study.results import RunResult, standard_error

Curve = list[tuple[int, float]]
Groups = dict[str, list[RunResult]]


@contextmanager
def _figure(path: Path, columns: int, rows: int = 1) -> Iterator[Any]:
    """Axes to draw on; saved as a whole when the block ends."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        rows, columns, figsize=(6 * columns, 4.3 * rows), layout="constrained", squeeze=False
    )
    yield axes.flatten()
    for axis in axes.flatten():
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=8)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=110)
    plt.close(figure)
    temporary.replace(path)


def curves_of(results: Sequence[RunResult]) -> Groups:
    """Runs that are averaged into one curve, by its label: seeds of one line and one budget."""
    several = len({result.tokens for result in results}) > 1
    found: Groups = {}
    for result in results:
        label = f"{result.line}, {result.tokens / 1e6:.2f} M" if several else result.line
        found.setdefault(label, []).append(result)
    return found


def _mean_curve(curves: Sequence[Curve]) -> tuple[list[int], list[float], list[float]]:
    """Tokens, mean and standard error where all curves have a point."""
    by_tokens = [dict(curve) for curve in curves]
    common = sorted(set.intersection(*(set(curve) for curve in by_tokens)))
    values = [[curve[tokens] for curve in by_tokens] for tokens in common]
    errors = [0.0 if len(v) < 2 else standard_error(v) for v in values]
    return common, [mean(v) for v in values], errors


def _plot_mean(axis: Any, curves: Sequence[Curve], label: str, marker: str = "") -> None:
    tokens, means, errors = _mean_curve(curves)
    (drawn,) = axis.plot(tokens, means, label=label, marker=marker, markersize=4)
    if any(errors):
        low = [m - e for m, e in zip(means, errors)]
        high = [m + e for m, e in zip(means, errors)]
        axis.fill_between(tokens, low, high, color=drawn.get_color(), alpha=0.2)


def plot_curves(results: Sequence[RunResult], lines: Sequence[Line], path: Path) -> None:
    """Training and validation loss over tokens, mean over seeds with its standard error."""
    with _figure(path, columns=2) as axes:
        for name, runs in curves_of(results).items():
            _plot_mean(axes[0], [run.training for run in runs], name)
            _plot_mean(axes[1], [run.validation["all"] for run in runs], name, marker="o")
        for axis, title in zip(axes, ("training loss", "validation loss")):
            axis.set(xlabel="tokens", ylabel="nats per token", title=title)
        highest = max(run.val_loss for run in results)
        lowest = min(run.val_loss for run in results)
        for axis in axes:
            axis.set_ylim(lowest - 0.1, highest + 1.5)


def plot_compute(results: Sequence[RunResult], lines: Sequence[Line], path: Path) -> None:
    """Figure 6a: loss against training FLOPs, power laws with 95% bands; the paper's beside it."""
    group_of = {line.name: line.group for line in lines}
    ours: dict[str, list[tuple[float, float]]] = {}
    for run in results:
        ours.setdefault(group_of[run.line], []).append((run.training_flops, run.val_loss))
    with _figure(path, columns=2) as axes:
        for number, (group, points) in enumerate(ours.items()):
            _plot_power_law(axes[0], points, group, f"C{number}")
            if paper := compute_points(group):
                _plot_power_law(axes[1], paper, group, f"C{number}")
        for axis, title in zip(axes, ("this study", "paper, Table 1")):
            axis.set(xscale="log", yscale="log", title=title)
            axis.set(xlabel="training FLOPs", ylabel="validation loss, nats per token")


def _plot_power_law(
    axis: Any, points: Sequence[tuple[float, float]], label: str, colour: str
) -> None:
    compute, losses = zip(*sorted(points))
    fit = fit_power_law(compute, losses)
    if fit is not None:
        error = "" if math.isnan(fit.slope_error) else f" ± {fit.slope_error:.4f}"
        label = f"{label}: C^({fit.slope:.4f}{error})"
        x = np.geomspace(compute[0] / 1.5, compute[-1] * 1.5, 50)
        log_x = np.log(x)
        axis.plot(x, np.exp(fit.predict(log_x)), color=colour)
        if fit.num_points >= 3:
            half = fit.half_band(log_x)
            low, high = np.exp(fit.predict(log_x) - half), np.exp(fit.predict(log_x) + half)
            axis.fill_between(x, low, high, color=colour, alpha=0.15)
    axis.plot(compute, losses, "o", color=colour, label=label, markersize=5)


def plot_sparsity(results: Sequence[RunResult], lines: Sequence[Line], path: Path) -> None:
    """Figure 6b: loss against sparse parameters, a line per sparsity (the row's group)."""
    group_of = {line.name: line.group for line in lines}
    ours: dict[str, list[tuple[float, float]]] = {}
    for run in results:
        ours.setdefault(group_of[run.line], []).append((float(run.sparse_params), run.val_loss))
    with _figure(path, columns=1) as axes:
        for number, (group, points) in enumerate(ours.items()):
            params, losses = zip(*sorted(points))
            fit = fit_line([math.log2(p) for p in params], losses)
            label = group if fit is None else f"{group}: {fit.slope:+.4f} nats per doubling"
            axes[0].plot(params, losses, "o", color=f"C{number}", label=label)
            if fit is not None:
                x = np.geomspace(params[0], params[-1], 20)
                axes[0].plot(x, fit.predict(np.log2(x)), color=f"C{number}")
        axes[0].set(xscale="log", xlabel="sparse parameters", ylabel="validation loss")


def plot_state(results: Sequence[RunResult], lines: Sequence[Line], path: Path) -> None:
    """Figure 10 and more: perplexity, gradient norm and the last memory layer's statistics."""
    names = sorted({name for run in results for name in run.state})
    columns = 3
    with _figure(path, columns, math.ceil((len(names) + 2) / columns)) as axes:
        for label, runs in curves_of(results).items():
            perplexity = [[(t, math.exp(loss)) for t, loss in run.training] for run in runs]
            _plot_mean(axes[0], perplexity, label)
            _plot_mean(axes[1], [run.grad_norm for run in runs], label)
            for axis, name in zip(axes[2:], names):
                if curves := [run.state[name] for run in runs if name in run.state]:
                    _plot_mean(axis, curves, label)
        for axis, name in zip(axes, ["training perplexity", "gradient norm", *names]):
            axis.set(xlabel="tokens", title=name.replace("_", " "))
        axes[0].set_yscale("log")


def plot_subsets(results: Sequence[RunResult], lines: Sequence[Line], path: Path) -> None:
    """Figure 11 by what small models can show: validation loss of every subset over tokens."""
    subsets = [name for name in results[0].validation if name != "all"]
    columns = min(3, len(subsets))
    with _figure(path, columns, math.ceil(len(subsets) / columns)) as axes:
        for label, runs in curves_of(results).items():
            for axis, subset in zip(axes, subsets):
                _plot_mean(axis, [run.validation[subset] for run in runs], label, marker="o")
        for axis, subset in zip(axes, subsets):
            axis.set(xlabel="tokens", ylabel="nats per token", title=subset)


PLOTS: Mapping[str, Callable[[Sequence[RunResult], Sequence[Line], Path], None]] = {
    "curves": plot_curves,
    "compute": plot_compute,
    "sparsity": plot_sparsity,
    "state": plot_state,
    "subsets": plot_subsets,
}
