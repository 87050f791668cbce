"""Mistakes around benchmark tasks, for :mod:`tests.unit.test_bad_input`."""

from __future__ import annotations

import json
from collections.abc import Callable

from tests.unit.bad_inputs import FITS, Case, Scene

AREA = "Benchmark tasks"
GOOD = {"passage": "p", "question": "q", "label": 1}


def _data(scene: Scene, name: str = "boolq/validation.jsonl", content: str | bytes = "") -> None:
    scene.file(f"tasks/{name}", content or json.dumps(GOOD) + "\n")


def _tasks(
    what: str,
    names: tuple[str, ...],
    *words: str,
    tasks: str = "boolq",
    prepare: Callable[[Scene], None] = _data,
) -> Case:
    """An ``evaluate --tasks`` of the good run, on local data that ``prepare`` writes."""

    def command(scene: Scene) -> list[str]:
        prepare(scene)
        data, output = scene.root / "tasks", scene.root / "results"
        scene.untouched.append(output)
        return [
            "evaluate", "--checkpoint", str(scene.trained), "--tasks", tasks.format(scene.root),
            "--task-data", str(data), "--output", str(output),
            *(word.format(scene.root) for word in words),
        ]  # fmt: skip

    return Case(AREA, what, command, names)


def _records(what: str, content: str | bytes, *names: str, file: str = "validation.jsonl") -> Case:
    """A file of BoolQ that is no good."""
    name = f"boolq/{file}"
    return _tasks(what, (file, *names), prepare=lambda scene: _data(scene, name, content))


def _two_formats(scene: Scene) -> None:
    _data(scene)
    _data(scene, "boolq/validation.parquet", b"x")


def _loop(what: str, names: tuple[str, ...], *words: str) -> Case:
    """Tasks in the training loop, refused before anything is built or written."""

    def command(scene: Scene) -> list[str]:
        _data(scene)
        local = f"train.task_data={scene.root / 'tasks'}"
        return scene.train(*FITS, "train.tasks_every=2", local, *words)

    return Case(AREA, what, command, names)


TASKS = [
    _tasks("task misspelt", ("'bolq'", "boolq"), tasks="bolq"),
    _tasks("no task named", ("no task is named", "paper"), tasks=","),
    _tasks("a limit of no items", ("--limit 0", "all items"), "--limit", "0"),
    _tasks("one token to read", ("--max-length 1", "at least 2"), "--max-length", "1"),
    _tasks("negative tokens of a forward", ("--max-tokens", "negative"), "--max-tokens", "-1"),
    _tasks("windows that never advance", ("--window-overlap 1000", "length"),
           "--window-overlap", "1000"),
    _tasks("no directory of task data", ("tasks", "no such directory"), prepare=lambda scene: None),
    _tasks("no data for a task", ("winogrande", "boolq", "validation"), tasks="winogrande"),
    _tasks("nothing to evaluate on", ("boolq", "validation"),
           prepare=lambda scene: _data(scene, "boolq/train.jsonl")),
    _tasks("a split in two formats", ("validation.jsonl", "keep one"), prepare=_two_formats),
    _tasks("results into a file", ("a file", "directory"),
           "--output", "{}/tasks/boolq/validation.jsonl"),
    _tasks("a text that is not there", ("missing.jsonl", "no such file"),
           tasks="{}/missing.jsonl"),
    _records("records that are not JSON", "{", "line 1", "not JSON"),
    _records("records that are no objects", "[1]\n", "line 1", "not an object"),
    _records("task data without records", "\n", "no record"),
    _tasks("records of another data set", ("boolq", "lack", "passage"),
           prepare=lambda scene: _data(scene, content=json.dumps({"text": "t"}) + "\n")),
    _records("a damaged Parquet file", b"PAR1", "cannot be read", file="validation.parquet"),
    _loop("a task misspelt, in the loop", ("'bolq'", "boolq"), "train.tasks=bolq"),
    _loop("no data for a task, in the loop", ("winogrande",), "train.tasks=winogrande"),
    _loop("a negative limit, in the loop", ("train.tasks_limit",), "train.tasks=boolq",
          "train.tasks_limit=-1"),
]  # fmt: skip
