"""What a run writes down: ``metrics.jsonl``, ``validation.jsonl``, TensorBoard, console lines.

Only rank 0 holds a :class:`MetricsWriter`. The two JSON-lines files are the record; TensorBoard
shows the same numbers grouped for the eye.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ultramem_ds.telemetry.board import TASKS_GROUP, VALIDATION_GROUP, Board, perplexities, scalars
from ultramem_ds.utils.files import to_json
from ultramem_ds.utils.lines import LineFile

METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete JSON lines of a file; a torn last line is left out, a missing file is empty.

    Raises:
        ValueError: if a line before the last is not JSON.
    """
    if not path.exists():
        return []
    records = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number} is not valid JSON: delete that line") from None
        if not isinstance(record, dict) or "step" not in record:
            raise ValueError(f"{path}:{number} is not a record with a step: delete that line")
        records.append(record)
    return records


def truncate_after(path: Path, step: int) -> None:
    """Drop the lines past ``step`` and a torn last line, atomically."""
    if not path.exists():
        return
    kept = [record for record in read_lines(path) if record["step"] <= step]
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class MetricsWriter:
    """Appends to a run directory's record, from ``first_step`` on.

    Args:
        run_dir: the run directory.
        first_step: the next step to be written; later lines left by an earlier attempt go.
        hyper: settings for TensorBoard's page of that name.
    """

    def __init__(
        self,
        run_dir: Path,
        first_step: int,
        hyper: Mapping[str, bool | str | float | int] = MappingProxyType({}),
    ) -> None:
        for name in (METRICS, VALIDATION):
            truncate_after(run_dir / name, first_step - 1)
        self._metrics = LineFile(run_dir / METRICS)
        self._validation = LineFile(run_dir / VALIDATION)
        self._board = Board(run_dir / "tensorboard", first_step, hyper)

    def close(self) -> None:
        """Flush and close everything."""
        self._metrics.close()
        self._validation.close()
        self._board.close()

    def write_step(self, record: dict[str, Any]) -> None:
        """Write one optimizer step; ``record`` holds ``step`` and numbers (or lists of numbers).

        Numbers that are not finite become null.
        """
        self._metrics.write(to_json(record))
        self._board.write(record["step"], scalars(record))

    def write_validation(self, step: int, losses: dict[str, float]) -> None:
        """Write validation losses by subset, nats per token; ``all`` is the token-weighted mean.

        The board also has their perplexities.
        """
        self._validation.write(to_json({"step": step, **losses}))
        tagged = {f"{VALIDATION_GROUP}/{name}": loss for name, loss in losses.items()}
        self._board.write(step, tagged | perplexities(losses))
        self._board.flush()

    def write_tasks(self, step: int, scores: dict[str, float]) -> None:
        """Write results of benchmark tasks by ``task/metric``, a line of its own."""
        self._validation.write(json.dumps({"step": step, "tasks": scores}))
        self._board.write(step, {f"{TASKS_GROUP}/{name}": score for name, score in scores.items()})
        self._board.flush()
