"""The numbers that a reader looks for among lm-eval's results."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultramem_ds.harness.paper import BENCHMARKS, Benchmark, paper_numbers
from ultramem_ds.harness.requests import Cuts
from ultramem_ds.harness.tasks import FILE_SUFFIXES, TaskSet

# Metrics worth a line, in the order of preference, where the paper does not choose.
_SHOWN = (
    "acc_norm", "acc", "exact_match", "f1",
    "word_perplexity", "byte_perplexity", "bits_per_byte", "token_perplexity",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; shares in 0 to 1, perplexities as they are.

    Attributes:
        name: column of the paper, or the task.
        task: of the harness.
        metric: with its filter.
        value: of the metric.
        stderr: standard error, None where there is none.
        shots: solved examples before each question, as text if it differs between subtasks.
        items: evaluated.
        requests: asked of the model.
        truncated: requests that lost the beginning of their context.
        shortened: generations that were allowed fewer tokens than the task asks for.
        paper: Table 7's number in per cent, None without one.
        note: what is particular.
    """

    name: str
    task: str
    metric: str
    value: float
    stderr: float | None
    shots: str
    items: int
    requests: int
    truncated: int
    shortened: int
    paper: float | None = None
    note: str = ""


def summarise(results: dict[str, Any], tasks: TaskSet, cuts: Cuts, preset: str) -> list[Row]:
    """A row for each task that was asked for (and metric, where the paper does not choose)."""
    rows: list[Row] = []
    paper = paper_numbers(preset)
    for name in tasks.names:
        leaves = members(name, tasks)
        if tasks.is_paper and (benchmark := _benchmark(name)) is not None:
            rows.append(_paper_row(benchmark, results, leaves, cuts, paper))
            continue
        scope = _scope(leaves, results, cuts)
        key = Path(name).stem if name.endswith(FILE_SUFFIXES) else name
        for source in [key] if key in results["results"] else leaves:
            found = results["results"][source]
            for metric in _metrics(found):
                rows.append(
                    Row(
                        name=source,
                        task=source,
                        metric=metric,
                        value=float(found[metric]),
                        stderr=_stderr(found, metric),
                        **scope,
                    )
                )
    return rows


def members(name: str, tasks: TaskSet) -> list[str]:
    """The leaf tasks of a name that was asked for."""
    groups, leaves = tasks.loaded.get("groups", {}), tasks.loaded["tasks"]
    if name in groups:
        return [task.task_name for task in groups[name].get_all_tasks()]
    key = Path(name).stem if name.endswith(FILE_SUFFIXES) else name
    if key in leaves:
        return [key]
    return [leaf for leaf, task in leaves.items() if name in _tags(task)]


def _tags(task: Any) -> list[str]:
    tag = task.get_config("tag") or []
    return [tag] if isinstance(tag, str) else list(tag)


def _benchmark(task: str) -> Benchmark | None:
    return next((b for b in BENCHMARKS if b.task == task), None)


def _paper_row(
    benchmark: Benchmark,
    results: dict[str, Any],
    leaves: Sequence[str],
    cuts: Cuts,
    paper: dict[str, float],
) -> Row:
    found = results["results"]
    if benchmark.macro:
        values = [float(found[leaf][benchmark.metric]) for leaf in leaves]
        errors = [_stderr(found[leaf], benchmark.metric) or 0.0 for leaf in leaves]
        value = sum(values) / len(values)
        stderr: float | None = math.sqrt(sum(e * e for e in errors)) / len(errors)
    else:
        value = float(found[benchmark.task][benchmark.metric])
        stderr = _stderr(found[benchmark.task], benchmark.metric)
    return Row(
        name=benchmark.column,
        task=benchmark.task,
        metric=benchmark.metric,
        value=value,
        stderr=stderr,
        paper=paper.get(benchmark.column),
        note=benchmark.note,
        **_scope(leaves, results, cuts),
    )


def _scope(leaves: Sequence[str], results: dict[str, Any], cuts: Cuts) -> dict[str, Any]:
    shots = sorted({int(results["n-shot"].get(leaf, 0)) for leaf in leaves})
    return {
        "shots": "-".join(map(str, dict.fromkeys([shots[0], shots[-1]]))) if shots else "0",
        "items": sum(results["n-samples"][leaf]["effective"] for leaf in leaves),
        "requests": sum(cuts.asked[leaf] for leaf in leaves),
        "truncated": sum(cuts.truncated[leaf] for leaf in leaves),
        "shortened": sum(cuts.shortened[leaf] for leaf in leaves),
    }


def _metrics(found: dict[str, Any]) -> Iterator[str]:
    for wanted in _SHOWN:
        for key in found:
            if key.partition(",")[0] == wanted:
                yield key


def _stderr(found: dict[str, Any], metric: str) -> float | None:
    name, _, filtered = metric.partition(",")
    value = found.get(f"{name}_stderr,{filtered}")
    return value if isinstance(value, float) and math.isfinite(value) else None


def average(rows: Sequence[Row]) -> tuple[float, float | None] | None:
    """Mean of the paper's ten columns and its own average, in per cent; None unless all are there.

    Of two formats of a benchmark the first counts.
    """
    columns = dict.fromkeys(benchmark.column for benchmark in BENCHMARKS)
    first = {column: next((r for r in rows if r.name == column), None) for column in columns}
    found = [row for row in first.values() if row is not None]
    if len(found) < len(columns):
        return None
    numbers = [row.paper for row in found if row.paper is not None]
    theirs = sum(numbers) / len(numbers) if len(numbers) == len(found) else None
    return 100 * sum(row.value for row in found) / len(found), theirs
