"""Results as files: lm-eval's JSON with what we know beside it, and a Markdown table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lm_eval.utils import handle_non_serializable

from ultramem_ds.harness.summary import Row, average
from ultramem_ds.telemetry.markdown import markdown_table
from ultramem_ds.utils.files import write_text

JSON_FILE, TABLE_FILE = "results.json", "results.md"
_PERPLEXITIES = ("perplexity", "bits_per_byte")


def results_json(results: dict[str, Any], rows: Sequence[Row], facts: dict[str, Any]) -> str:
    """lm-eval's results, with ``summary`` (the table) and ``ultramem`` (how it came about)."""
    document = {**results, "summary": [asdict(row) for row in rows], "ultramem": facts}
    return json.dumps(document, indent=2, default=handle_non_serializable, ensure_ascii=False)


def results_markdown(rows: Sequence[Row], facts: dict[str, Any]) -> str:
    """The table, what was cut, and how it came about."""
    with_paper = any(row.paper is not None for row in rows)
    header = ["benchmark", "task", "metric", "value", "std. error", "shots", "items", "truncated"]
    table = [_cells(row, with_paper) for row in rows]
    mean = average(rows)
    if mean is not None:
        theirs = [_number(mean[1], 1.0)] if with_paper else []
        table.append(["Avg", "", "", f"{mean[0]:.2f}", "", "", "", "", *theirs])
    parts = [
        f"# {facts['checkpoint']}\n",
        markdown_table([*header, "paper"] if with_paper else header, table),
        "Accuracies are in per cent. Truncated: requests that were longer than the model reads "
        f"({facts['max_length']} tokens) and lost the beginning of their context.\n",
        *_warnings(rows),
        *(f"- {row.name} ({row.task}): {row.note}." for row in rows if row.note),
        *_facts(facts),
    ]
    return "\n".join(parts) + "\n"


def _cells(row: Row, with_paper: bool) -> list[str]:
    factor = 1.0 if row.metric.partition(",")[0].endswith(_PERPLEXITIES) else 100.0
    cells = [
        row.name,
        row.task,
        row.metric.partition(",")[0],
        _number(row.value, factor),
        _number(row.stderr, factor),
        row.shots,
        f"{row.items:,}",
        f"{row.truncated:,} of {row.requests:,}",
    ]
    return [*cells, _number(row.paper, 1.0)] if with_paper else cells


def _number(value: float | None, factor: float) -> str:
    return "-" if value is None else f"{factor * value:.2f}"


def _warnings(rows: Sequence[Row]) -> list[str]:
    return [f"**{line}**\n" for line in cut_lines(rows)]


def cut_lines(rows: Sequence[Row]) -> list[str]:
    """A sentence for each task whose requests did not fit the model."""
    lines: dict[str, None] = {}
    for row in rows:
        if row.truncated:
            lines[
                f"{row.task}: {row.truncated:,} of {row.requests:,} requests were too long for the "
                "model and lost the beginning of their context"
            ] = None
        if row.shortened:
            lines[
                f"{row.task}: {row.shortened:,} answers were allowed half of the model's length, "
                "less than the task asks for"
            ] = None
    return list(lines)


def _facts(facts: dict[str, Any]) -> list[str]:
    prefix = facts["prefix_token"]
    lines = [
        f"- Model: {facts['preset']} ({facts['kind']}), step {facts['step']:,}, "
        f"{facts['precision']} on {facts['device']}, {facts['ranks']} ranks"
        + (f", tables {facts['partition']}" if facts["partition"] else ""),
        f"- Prefix token of requests without context: {prefix['text']!r} (id {prefix['id']}), the "
        "end-of-text token; padded vocabulary entries have no probability",
        f"- Limit: {facts['limit'] or 'all items'}; seeds: "
        + ", ".join(f"{name} {seed}" for name, seed in facts["seeds"].items()),
        "- Versions: " + ", ".join(f"{name} {v}" for name, v in facts["versions"].items()),
    ]
    for task, notes in facts["local_data_lacks"].items():
        lines.append(f"- Local data of {task}: {', '.join(notes)}")
    return lines


def write_results(
    output: Path, results: dict[str, Any], rows: Sequence[Row], facts: dict[str, Any]
) -> list[Path]:
    """Write both files into ``output``; returns their paths."""
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / JSON_FILE, results_json(results, rows, facts) + "\n")
    write_text(output / TABLE_FILE, results_markdown(rows, facts))
    return [output / JSON_FILE, output / TABLE_FILE]
