"""From task names to tasks with their data, checked before any model is loaded.

A name is one of lm-evaluation-harness' (a task, a group or a tag), one of ours, the group
``paper``, or the path of a ``.jsonl``, ``.arrow`` or ``.parquet`` file whose ``text`` is measured
for perplexity.
"""

from __future__ import annotations

import copy
import difflib
import functools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from lm_eval.api.metrics import weighted_perplexity
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml

from ultramem_ds.harness.data import LocalData, find_data, read_records, use_files
from ultramem_ds.harness.paper import BENCHMARKS, GROUP
from ultramem_ds.harness.quiet import without_bars
from ultramem_ds.harness.random_state import preserved_random_state

FILE_SUFFIXES = (".jsonl", ".arrow", ".parquet")
SEED = 1234  # of shots and of tasks that shuffle; the harness' own default

# ARC in the format of MMLU: the harness has it only as a cloze task.
ARC_LETTER: dict[str, Any] = {
    "task": "arc_challenge_letter",
    "dataset_path": "allenai/ai2_arc",
    "dataset_name": "ARC-Challenge",
    "output_type": "multiple_choice",
    "training_split": "train",
    "validation_split": "validation",
    "test_split": "test",
    "fewshot_split": "train",
    "fewshot_config": {"sampler": "first_n"},
    "description": "The following are multiple choice questions (with answers) about science.\n\n",
    "doc_to_text": "{{question.strip()}}\n{% for text in choices.text %}"
    "{{ 'ABCDE'[loop.index0] }}. {{ text }}\n{% endfor %}Answer:",
    "doc_to_target": "{{choices.label.index(answerKey)}}",
    "doc_to_choice": "{{ 'ABCDE'[:choices.text|length]|list }}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1.0},
}


@dataclass(frozen=True)
class TaskSet:
    """Tasks ready to be evaluated.

    Attributes:
        names: as asked for, ``paper`` expanded.
        loaded: what ``lm_eval.evaluator.evaluate`` takes: tasks, groups and who is in which.
        local: local data in use, by task.
        is_paper: whether the paper's settings apply.
    """

    names: tuple[str, ...]
    loaded: dict[str, Any]
    local: dict[str, LocalData]
    is_paper: bool


def load_tasks(
    names: Sequence[str], data_dir: Path | None, count_tokens: Callable[[str], int]
) -> TaskSet:
    """Build the tasks.

    Args:
        names: see the module.
        data_dir: ``--task-data``: replaces every task's download; None downloads.
        count_tokens: of a text, for the perplexity per token.

    Raises:
        ValueError: an unknown name (the message names near ones), data that is missing or is not
            what the task reads.
    """
    if data_dir is not None and not data_dir.is_dir():
        raise ValueError(f"--task-data {data_dir}: no such directory")
    manager = _fresh_manager()
    index = manager.task_index
    index[ARC_LETTER["task"]] = Entry(ARC_LETTER["task"], Kind.TASK, None, ARC_LETTER, set())
    is_paper = GROUP in names
    expanded = list(dict.fromkeys(_expand(names)))
    _check_names([name for name in expanded if not name.endswith(FILE_SUFFIXES)], manager)
    settings = _paper_settings(index) if is_paper else {}
    local: dict[str, LocalData] = {}
    missing: list[str] = []
    leaves = dict.fromkeys(leaf for name in expanded for leaf in leaf_tasks(name, index))
    for leaf in leaves:
        files = find_data(data_dir, leaf) if data_dir is not None else {}
        if data_dir is not None and not files:
            missing.append(leaf)
            continue
        _lay_over(index, leaf, settings.get(leaf, {}), files, local)
    if missing:
        assert data_dir is not None
        raise ValueError(_missing_message(missing, data_dir))
    specs = [_text_task(Path(n)) if n.endswith(FILE_SUFFIXES) else n for n in expanded]
    loaded: dict[str, Any] = _load(manager, specs)
    for task in loaded["tasks"].values():
        _check_fields(task)
        if task.OUTPUT_TYPE == "loglikelihood_rolling":
            _add_token_perplexity(task, count_tokens)
    return TaskSet(tuple(expanded), loaded, local, is_paper)


@functools.cache
def _all_tasks() -> TaskManager:
    """The harness' index: thousands of files are read for it, once per process."""
    return TaskManager()


def _fresh_manager() -> TaskManager:
    """One whose index may be changed."""
    manager = copy.copy(_all_tasks())
    manager._index = dict(manager._index)
    return manager


def _expand(names: Sequence[str]) -> Iterator[str]:
    for name in names:
        if name == GROUP:
            yield from (benchmark.task for benchmark in BENCHMARKS)
        else:
            yield name


def leaf_tasks(name: str, index: dict[str, Any]) -> Iterator[str]:
    """The tasks below a group or tag, or the task itself; none for a file."""
    entry = index.get(name)
    if entry is None:
        return
    if entry.kind is Kind.TAG:
        for member in sorted(entry.tags):
            yield from leaf_tasks(member, index)
    elif entry.kind is Kind.GROUP:
        for member in entry.cfg.get("task", []):
            key = member if isinstance(member, str) else member.get("task", member.get("group"))
            yield from leaf_tasks(key, index)
    else:
        yield name


def _check_names(names: Sequence[str], manager: TaskManager) -> None:
    known = manager.task_index
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, GROUP], n=3, cutoff=0.4)
            hint = f"; near ones: {', '.join(near)}" if near else ""
            raise ValueError(f"unknown task {name!r}{hint}")


def _paper_settings(index: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        leaf: benchmark.settings
        for benchmark in BENCHMARKS
        for leaf in leaf_tasks(benchmark.task, index)
    }


def _lay_over(
    index: dict[str, Any],
    leaf: str,
    settings: dict[str, Any],
    files: dict[str, Path],
    local: dict[str, LocalData],
) -> None:
    """Put settings and local files into a leaf task's entry of the index."""
    if not settings and not files:
        return
    entry = index[leaf]
    if entry.kind is Kind.PY_TASK:
        raise ValueError(f"{leaf} is a task in Python, which does not read local files")
    config = dict(load_yaml(entry.yaml_path) if entry.yaml_path else entry.cfg) | settings
    if files:
        local[leaf] = use_files(config, leaf, files)
    index[leaf] = Entry(leaf, entry.kind, None, config, entry.tags)


def _missing_message(missing: Sequence[str], data_dir: Path) -> str:
    there = sorted(path.name for path in data_dir.iterdir() if path.is_dir())
    shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    has = ", ".join(there[:5]) + (f" and {len(there) - 5} more" if len(there) > 5 else "")
    return (
        f"--task-data {data_dir} has no data for {shown}: a directory TASK with train, validation "
        f"or test.jsonl, .arrow or .parquet; it has {has or 'no directory'}"
    )


def _text_task(path: Path) -> dict[str, Any]:
    """Perplexity of the ``text`` of a file's records."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    records = read_records(path)
    return {
        "task": path.stem,
        "custom_dataset": lambda **unused: {"test": records},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [
            {"metric": name, "aggregation": aggregation, "higher_is_better": False}
            for name, aggregation in (
                ("word_perplexity", "weighted_perplexity"),
                ("byte_perplexity", "weighted_perplexity"),
                ("bits_per_byte", "bits_per_byte"),
            )
        ],
        "metadata": {"version": 1.0},
    }


def _load(manager: TaskManager, specs: Sequence[str | dict[str, Any]]) -> dict[str, Any]:
    with preserved_random_state(), without_bars():
        random.seed(SEED)
        try:
            return dict(manager.load(list(specs)))
        except ValueError:
            raise
        except jinja2.UndefinedError as error:  # a template met a record without its field
            raise ValueError(
                f"the records of {', '.join(map(str, specs))} lack a field that the task reads: "
                f"{error}"
            ) from None
        except Exception as error:  # downloads and tasks' own code raise anything
            reason = str(error).strip().splitlines()
            raise ValueError(
                f"the data of {', '.join(map(str, specs))} could not be loaded "
                f"({type(error).__name__}: {reason[0] if reason else ''}); without a network, or "
                "for gated data, give --task-data DIR"
            ) from None


def _check_fields(task: ConfigurableTask) -> None:
    """Templates silently render nothing for a field that records do not have."""
    for key in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        template = task.get_config(key)
        if not isinstance(template, str):
            continue
        if re.fullmatch(r"\w+", template):
            wanted = {template}
        else:
            wanted = jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(template))
        lacking = sorted(wanted - set(task.features))
        if lacking:
            raise ValueError(
                f"the records of {task.task_name} lack {', '.join(lacking)}; they have "
                f"{', '.join(task.features)}"
            )


def _add_token_perplexity(task: ConfigurableTask, count_tokens: Callable[[str], int]) -> None:
    """Beside the words and bytes of a text, count its tokens."""
    own = task.process_results

    def process_results(doc: dict[str, Any], results: list[float]) -> dict[str, Any]:
        (loglikelihood,) = results
        tokens = count_tokens(task.doc_to_target(doc))
        return {**own(doc, results), "token_perplexity": (loglikelihood, tokens)}

    task.process_results = process_results
    task._aggregation_list["token_perplexity"] = weighted_perplexity
    task._higher_is_better["token_perplexity"] = False
