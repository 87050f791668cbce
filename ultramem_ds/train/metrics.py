"""What a run writes down: ``metrics.jsonl``, ``validation.jsonl``, TensorBoard, console lines.

Only rank 0 holds a :class:`MetricsWriter`. The two JSON-lines files are the record; TensorBoard
shows the same numbers grouped for the eye.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"

# metrics.jsonl key -> TensorBoard tag; keys not listed go under "memory/".
_TAGS = {
    "loss": "train/loss",
    "aux_loss": "train/aux_loss",
    "balance_loss": "train/balance_loss",
    "grad_norm": "train/grad_norm",
    "tokens": "train/tokens",
    "lr": "learning_rate/dense",
    "lr_values": "learning_rate/values",
    "tokens_per_s": "throughput/tokens_per_s",
    "step_time_s": "throughput/step_time_s",
}


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
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number} is not valid JSON") from None
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
    """

    def __init__(self, run_dir: Path, first_step: int) -> None:
        for name in (METRICS, VALIDATION):
            truncate_after(run_dir / name, first_step - 1)
        self._metrics = open(run_dir / METRICS, "a", encoding="utf-8")  # noqa: SIM115
        self._validation = open(run_dir / VALIDATION, "a", encoding="utf-8")  # noqa: SIM115
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def close(self) -> None:
        """Flush and close everything."""
        self._metrics.close()
        self._validation.close()
        self._board.close()

    def write_step(self, record: dict[str, Any]) -> None:
        """Write one optimizer step; ``record`` holds ``step`` and numbers (or lists of numbers)."""
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()
        for key, value in record.items():
            if isinstance(value, int | float) and key != "step":
                tag = _TAGS.get(key, key if "/" in key else f"memory/{key}")
                self._board.add_scalar(tag, value, record["step"])

    def write_validation(self, step: int, losses: dict[str, float]) -> None:
        """Write validation losses by subset, nats per token; ``all`` is the token-weighted mean."""
        self._validation.write(json.dumps({"step": step, **losses}) + "\n")
        self._validation.flush()
        for subset, loss in losses.items():
            self._board.add_scalar(f"validation/{subset}", loss, step)
        self._board.flush()
