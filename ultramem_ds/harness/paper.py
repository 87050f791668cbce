"""The ten benchmarks of the paper: which task measures each, with whose settings, and its numbers.

The paper (section 5.1, Appendix E) says that decoding is "aligned with LLaMA3". Shots and formats
below are LLaMA 3's (meta-llama/llama3, ``eval_details.md``) where lm-evaluation-harness has them;
``note`` names what differs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GROUP = "paper"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One column of Table 7, or a second format of one."""

    column: str  # in the paper's table
    task: str  # of lm-evaluation-harness, or of this package
    metric: str  # key of the result, with its filter
    settings: dict[str, Any] = field(default_factory=dict)  # laid over every leaf task's own
    macro: bool = False  # the mean of the subtasks' results, however many items each has
    note: str = ""  # what differs from LLaMA 3's settings


BENCHMARKS = (
    Benchmark(
        column="ARC-C",
        task="arc_challenge_letter",
        metric="acc,none",
        settings={"num_fewshot": 25},
        note="MMLU's format, as LLaMA 3 has it",
    ),
    Benchmark(
        column="ARC-C",
        task="arc_challenge",
        metric="acc_norm,none",
        settings={"num_fewshot": 25},
        note="cloze format, not LLaMA 3's",
    ),
    Benchmark(column="GPQA", task="gpqa_main_zeroshot", metric="acc,none"),
    Benchmark(
        column="TriviaQA",
        task="triviaqa",
        metric="exact_match,remove_whitespace",
        settings={"num_fewshot": 5, "dataset_name": "rc.wikipedia.nocontext"},
    ),
    Benchmark(
        column="MMLU", task="mmlu", metric="acc,none", settings={"num_fewshot": 5}, macro=True
    ),
    Benchmark(column="BBH", task="bbh_cot_fewshot", metric="exact_match,get-answer"),
    Benchmark(column="BoolQ", task="boolq", metric="acc,none", settings={"num_fewshot": 0}),
    Benchmark(
        column="HellaSwag",
        task="hellaswag",
        metric="acc_norm,none",
        settings={"num_fewshot": 0},
        note="LLaMA 3 lists none; without shots",
    ),
    Benchmark(
        column="WinoGrande", task="winogrande", metric="acc,none", settings={"num_fewshot": 5}
    ),
    Benchmark(
        column="AGIEval",
        task="agieval_en",
        metric="acc,none",
        macro=True,
        note="without shots; LLaMA 3 has 3 to 5, which the harness does not carry",
    ),
    Benchmark(column="DROP", task="drop", metric="f1,none", settings={"num_fewshot": 3}),
)


def paper_numbers(preset: str) -> dict[str, float]:
    """Table 7's row of a preset by column, in per cent; empty for presets it does not have."""
    table = json.loads(Path(__file__).with_name("paper_table7.json").read_text())
    row: dict[str, float] = table["rows"].get(preset, {})
    return row
