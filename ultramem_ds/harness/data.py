"""Task data from local files, in place of a download.

``DIR/TASK/{train,validation,test,dev}.{jsonl,arrow,parquet}`` holds records in the schema of the
task's own data set. Nothing is cached: the files are read each time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet

SPLITS = ("train", "validation", "test", "dev")
_SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")
# Tasks that read another one's data.
SAME_DATA = {"arc_challenge_letter": "arc_challenge"}


@dataclass(frozen=True)
class LocalData:
    """The files of one task.

    Attributes:
        files: by split.
        notes: what the files lack of what the task's settings name, in words.
    """

    files: dict[str, Path]
    notes: list[str] = field(default_factory=list)


def find_data(root: Path, task: str) -> dict[str, Path]:
    """The files of ``task`` under ``root``, by split; empty if there are none.

    Raises:
        ValueError: a split is there in two formats.
    """
    directory = root / task
    if not directory.is_dir():
        directory = root / SAME_DATA.get(task, task)
    found: dict[str, Path] = {}
    for split in SPLITS:
        paths = [directory / f"{split}{suffix}" for suffix in _READERS]
        present = [path for path in paths if path.is_file()]
        if len(present) > 1:
            raise ValueError(f"{present[0]} and {present[1].name} are the same split; keep one")
        if present:
            found[split] = present[0]
    return found


def use_files(config: dict[str, Any], task: str, files: dict[str, Path]) -> LocalData:
    """Change a task's configuration so that it reads ``files``.

    Splits that are not there are taken out of the configuration; the harness then evaluates on
    ``validation`` where there is no ``test``, and takes shots from another split.

    Raises:
        ValueError: no split is there that could be evaluated, or a file is empty or unreadable.
    """
    splits = {split: read_records(path) for split, path in files.items()}
    missing: dict[str, None] = {}  # one split may be asked for twice, to test and for shots
    for key in _SPLIT_KEYS:
        split = config.get(key)
        if split is not None and split not in splits:
            config[key] = None
            missing[split] = None
    if config.get("test_split") is None and config.get("validation_split") is None:
        raise ValueError(
            f"{next(iter(files.values())).parent} has nothing to evaluate {task} on: it needs "
            f"{' or '.join(missing)}"
        )
    config["custom_dataset"] = _returning(splits)
    if config.get("process_docs") is not None:
        config["process_docs"] = remembered(config["process_docs"])
    return LocalData(files, [f"no {split} split" for split in missing])


def _returning(splits: dict[str, datasets.Dataset]) -> Callable[..., dict[str, datasets.Dataset]]:
    def custom_dataset(**unused: Any) -> dict[str, datasets.Dataset]:
        return splits

    return custom_dataset


def remembered(
    process: Callable[[datasets.Dataset], datasets.Dataset],
) -> Callable[[datasets.Dataset], datasets.Dataset]:
    """``process`` once per split: a task that shuffles its choices must not shuffle them anew."""
    done: dict[int, tuple[datasets.Dataset, datasets.Dataset]] = {}

    def process_docs(split: datasets.Dataset) -> datasets.Dataset:
        if id(split) not in done:
            done[id(split)] = (split, process(split))
        return done[id(split)][1]

    return process_docs


def read_records(path: Path) -> datasets.Dataset:
    """The records of one file.

    Raises:
        ValueError: it has none, or cannot be read as what its name says.
    """
    try:
        records = _READERS[path.suffix](path)
    except (OSError, ValueError, KeyError) as error:  # pyarrow's errors are among them
        raise ValueError(f"{path} cannot be read: {error}") from None
    if len(records) == 0:
        raise ValueError(f"{path} holds no record")
    return records


def _read_jsonl(path: Path) -> datasets.Dataset:
    records = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not JSON: {error}") from None
            if not isinstance(record, dict):
                raise ValueError(f"line {number} is not an object")
            records.append(record)
    return datasets.Dataset.from_list(records)


def _read_parquet(path: Path) -> datasets.Dataset:
    return datasets.Dataset(datasets.table.InMemoryTable(pyarrow.parquet.read_table(path)))


def _read_arrow(path: Path) -> datasets.Dataset:
    return datasets.Dataset.from_file(str(path))


_READERS: dict[str, Callable[[Path], datasets.Dataset]] = {
    ".jsonl": _read_jsonl,
    ".arrow": _read_arrow,
    ".parquet": _read_parquet,
}
