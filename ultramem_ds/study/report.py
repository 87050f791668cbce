"""A study as a page: Markdown table, figures, and a small JSON with everything they show."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ultramem_ds.study.expand import Line, Trial
from ultramem_ds.study.figures import PLOTS
from ultramem_ds.study.results import (
    Difference,
    RunResult,
    Summary,
    read_results,
    standard_error,
    summarise,
)
from ultramem_ds.study.spec import Study
from ultramem_ds.telemetry.report import markdown_table
from ultramem_ds.utils.files import write_text


def _loss(by_seed: Mapping[int, float]) -> str:
    values = list(by_seed.values())
    error = standard_error(values)
    return f"{mean(values):.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}")


def _change(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    error = "" if math.isnan(difference.error) else f" ± {difference.error:.4f}"
    return f"{difference.mean:+.4f}{error} {difference.mark}".strip()


def _paper(summary: Summary, by_name: Mapping[str, Line]) -> list[str]:
    """The paper's validation loss and its difference from the same reference."""
    paper = summary.line.paper
    if paper is None or paper.valid is None:
        return ["-", "-"]
    reference = by_name[summary.line.compare].paper if summary.line.compare else None
    if reference is None or reference.valid is None:
        return [f"{paper.valid:.3f}", "-"]
    return [f"{paper.valid:.3f}", f"{paper.valid - reference.valid:+.3f}"]


def losses_table(summaries: Sequence[Summary], lines: Sequence[Line]) -> str:
    """Mean ± standard error, paired differences and the paper's, as Markdown."""
    by_name = {line.name: line for line in lines}
    with_paper = any(line.paper for line in lines)
    rows = []
    for summary in summaries:
        row = [
            summary.line.name,
            f"{summary.tokens / 1e6:,.2f} M",
            str(len(summary.valid)),
            _loss(summary.train),
            _loss(summary.valid),
            summary.line.compare or "-",
            _change(summary.valid_difference),
        ]
        rows.append(row + (_paper(summary, by_name) if with_paper else []))
    header = ["row", "tokens", "seeds", "training loss", "validation loss", "against", "difference"]
    return markdown_table(header + (["paper", "difference"] if with_paper else []), rows)


def _reading(results: Sequence[RunResult], corpus_tokens: int) -> str:
    """How often the longest run has seen its corpus."""
    longest = max(result.tokens for result in results)
    epochs = longest / corpus_tokens
    often = "nothing twice" if epochs <= 1 else f"the corpus {epochs:.2f} times"
    return (
        f"The corpus has {corpus_tokens / 1e6:,.1f} M training tokens; a run of "
        f"{longest / 1e6:,.2f} M has seen {often}, if subsets are drawn by their tokens."
    )


def write_study(
    name: str,
    study: Study,
    lines: Sequence[Line],
    trials: Sequence[Trial],
    output: Path,
    corpus_tokens: int,
) -> list[Path]:
    """Write ``NAME.md``, ``NAME.json`` and the figures of the runs that are finished.

    Args:
        name: the study's short name.
        study: its file.
        lines: of the table.
        trials: all of them, finished or not.
        output: directory of runs and report.
        corpus_tokens: training tokens of the data.

    Returns:
        The files written; only the page if no run is finished.
    """
    results = read_results(trials, output)
    page = output / f"{name}.md"
    text = f"# {study.title}\n\n{study.question}\n\n"
    text += f"{len(results)} of {len(trials)} runs are finished.\n"
    if not results:
        write_text(page, text)
        return [page]
    budgets = list(dict.fromkeys(trial.tokens for trial in trials))
    summaries = summarise(lines, results, budgets)
    written = [page, output / f"{name}.json"]
    text += f"{_reading(results, corpus_tokens)}\n\n{losses_table(summaries, lines)}\n"
    text += (
        "Training loss: mean of a run's last tenth. ±: standard error over seeds. Differences of "
        "validation loss are paired by seed; * p < 5%, ** p < 1% (Student's t), ? one seed: no "
        "test.\n"
    )
    for figure in study.figures:
        path = output / f"{name}-{figure}.png"
        PLOTS[figure](results, lines, path)
        written.append(path)
        text += f"\n![{figure}]({path.name})\n"
    values = to_json(name, study, summaries, results)
    write_text(output / f"{name}.json", json.dumps(values, separators=(",", ":")) + "\n")
    write_text(page, text)
    return written


def to_json(
    name: str, study: Study, summaries: Sequence[Summary], results: Sequence[RunResult]
) -> dict[str, Any]:
    """Everything that the page shows, as plain values."""
    rows = []
    for summary in summaries:
        row: dict[str, Any] = {
            "row": summary.line.name,
            "preset": summary.line.preset,
            "overrides": list(summary.line.overrides),
            "tokens": summary.tokens,
            "validation_loss": {str(k): round(v, 5) for k, v in summary.valid.items()},
            "training_loss": {str(k): round(v, 5) for k, v in summary.train.items()},
            "against": summary.line.compare or None,
        }
        if (difference := summary.valid_difference) is not None:
            known = not math.isnan(difference.error)
            row["difference"] = round(difference.mean, 5)
            row["difference_error"] = round(difference.error, 5) if known else None
            row["p"] = float(f"{difference.p:.3g}") if known else None
        rows.append(row)
    return {
        "study": name,
        "title": study.title,
        "rows": rows,
        "runs": [result.to_json() for result in results],
    }
