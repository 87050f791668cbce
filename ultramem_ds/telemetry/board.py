"""TensorBoard's view of a run: tags grouped for the eye, a page that compares runs, parameters.

One event per call holds all of its numbers: a tenth of the cost of one event per number.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import FileWriter
from torch.utils.tensorboard.summary import custom_scalars, hparams

from ultramem_ds.config.schema import Config
from ultramem_ds.model.accounting import count

# TensorBoard sorts groups by name and opens the first two: the numbers put what matters first.
VALIDATION_GROUP = "2_validation"
PERPLEXITY_GROUP = "2_validation_perplexity"
TASKS_GROUP = "2_tasks"

# Key of metrics.jsonl -> (tag, factor to the tag's unit).
_TAGS: dict[str, tuple[str, float]] = {
    "loss": ("1_loss/train", 1.0),
    "aux_loss": ("1_loss/memory_auxiliary", 1.0),
    "balance_loss": ("1_loss/expert_balance", 1.0),
    "grad_norm": ("5_grad_norm/total", 1.0),
    "grad_norm_dense": ("5_grad_norm/dense", 1.0),
    "grad_norm_tables": ("5_grad_norm/tables", 1.0),
    "lr": ("6_learning_rate/dense", 1.0),
    "lr_values": ("6_learning_rate/tables", 1.0),
    "tokens_per_s": ("3_throughput/tokens_per_s", 1.0),
    "model_flops_per_s": ("3_throughput/model_gflops_per_s", 1e-9),
    "mfu": ("3_throughput/model_flops_utilisation", 1.0),
    "step_time_s": ("3_throughput/step_ms", 1e3),
    "tokens": ("3_throughput/tokens", 1.0),
    "memory_bytes": ("8_memory_mb/current", 1e-6),
    "peak_memory_bytes": ("8_memory_mb/peak", 1e-6),
}
# First part of a key with a slash -> (group, factor).
_GROUPS: dict[str, tuple[str, float]] = {
    "time_s": ("4_time_ms", 1e3),
    "wire_bytes": ("8_wire_mb", 1e-6),
    "data": ("9_data_share", 1.0),
    "grad_signal": ("5_grad_signal", 1.0),
}
OTHER = "9_guards"  # keys without a place of their own: counters of the guards

# Page "Custom scalars": charts that hold every run, by what one asks of them.
_LAYOUT = {
    "1 Quality": {
        "training loss (nats per token)": ["Multiline", ["1_loss/train"]],
        "validation loss (nats per token)": ["Multiline", ["2_validation/all"]],
        "validation loss by subset": ["Multiline", [r"2_validation/(?!all$).*"]],
        "validation perplexity": ["Multiline", [r"2_validation_perplexity/.*"]],
        "benchmark tasks": ["Multiline", [r"2_tasks/.*"]],
    },
    "2 Stability": {
        "gradient norm before clipping": ["Multiline", ["5_grad_norm/total"]],
        "gradient norm by kind of parameter": ["Multiline", [r"5_grad_norm/(dense|tables)"]],
        "signal in the gradient (0 = noise, 1 = all signal)": ["Multiline", [r"5_grad_signal/.*"]],
        "learning rates": ["Multiline", [r"6_learning_rate/.*"]],
    },
    "3 Speed": {
        "tokens per second": ["Multiline", ["3_throughput/tokens_per_s"]],
        "model FLOPs utilisation": ["Multiline", ["3_throughput/model_flops_utilisation"]],
        "memory of rank 0 (MB)": ["Multiline", [r"8_memory_mb/.*"]],
        "table traffic of rank 0 (MB per step)": ["Multiline", ["8_wire_mb/total"]],
    },
    "4 Time of rank 0 (ms per step)": {
        phase: ["Multiline", [f"4_time_ms/{phase}"]]
        for phase in ("data", "forward", "lookup", "backward", "optimizer", "save")
    },
    "5 Sparse parts": {
        "rows of the tables touched": ["Multiline", [r"7_memory_layers/rows_touched/.*"]],
        "recall of the top-m search": ["Multiline", [r"7_memory_layers/recall/.*"]],
        "busiest expert / mean": ["Multiline", [r"7_expert_load/busiest/.*"]],
        "load of each expert / mean, all blocks": ["Multiline", [r"7_expert_load/expert_.*"]],
    },
    "6 Data": {"realised share of each subset": ["Multiline", [r"9_data_share/.*"]]},
}

_LARGEST = 80.0  # nats: what a point of TensorBoard, a 32-bit float, can hold of a perplexity

# What the page "HParams" compares; runs of all kinds have all of them.
_RESULTS = ("2_validation/all", "1_loss/train", "3_throughput/tokens_per_s", "8_memory_mb/peak")


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of ``metrics.jsonl`` by tag.

    Lists by expert become each block's busiest and idlest expert over the mean, and each expert's
    load in all blocks over the mean; text is left out.
    """
    tagged: dict[str, float] = {}
    for key, value in record.items():
        if key == "expert_share":
            tagged |= _loads(value)
            for block, shares in enumerate(value):
                mean = max(sum(shares) / len(shares), 1e-12)
                tagged[f"7_expert_load/busiest/block_{block}"] = max(shares) / mean
                tagged[f"7_expert_load/idlest/block_{block}"] = min(shares) / mean
        elif key != "step" and isinstance(value, int | float):
            tag, factor = _place(key)
            tagged[tag] = value * factor
    return tagged


def _loads(shares_by_block: Sequence[Sequence[float]]) -> dict[str, float]:
    """Each expert's load over the mean, blocks together: equal experts are at 1.

    Apart by block they would be hundreds of curves; ``metrics.jsonl`` has them.
    """
    loads = [sum(shares) for shares in zip(*shares_by_block)]
    mean = max(sum(loads) / len(loads), 1e-12)
    return {f"7_expert_load/expert_{i:02}": load / mean for i, load in enumerate(loads)}


def perplexities(losses: Mapping[str, float]) -> dict[str, float]:
    """Losses by subset, nats per token, as tagged perplexities; too large ones are infinite."""
    return {
        f"{PERPLEXITY_GROUP}/{name}": math.exp(loss) if loss < _LARGEST else math.inf
        for name, loss in losses.items()
    }


def _place(key: str) -> tuple[str, float]:
    if key in _TAGS:
        return _TAGS[key]
    head, _, rest = key.partition("/")
    if head.startswith("layer_"):
        return f"7_memory_layers/{rest}/{head}", 1.0
    if head in _GROUPS:
        group, factor = _GROUPS[head]
        return f"{group}/{rest}", factor
    return (key if rest else f"{OTHER}/{key}"), 1.0


def hyper_parameters(config: Config, world_size: int) -> dict[str, bool | str | float | int]:
    """The settings that runs are compared by, the same names for every kind of model."""
    return {
        "global_batch_size": config.train.global_batch_size,
        "kind": config.model.kind,
        "lr": config.optim.lr,
        "max_steps": config.train.max_steps,
        "params": count(config).params,
        "partition": config.memory.partition if config.has_memory else "-",
        "precision": config.train.precision,
        "preset": config.preset,
        "seed": config.train.seed,
        "seq_len": config.model.seq_len,
        "world_size": world_size,
    }


class Board:
    """One event file of a run.

    Args:
        directory: the run's ``tensorboard/``.
        first_step: the next step to be written; points from there on, left by an earlier
            attempt, disappear.
        hyper: as of :func:`hyper_parameters`; empty to leave that page out.
    """

    def __init__(
        self, directory: Path, first_step: int, hyper: Mapping[str, bool | str | float | int]
    ) -> None:
        self._directory = directory
        self._lost = False
        self._file = FileWriter(str(directory))
        self._file.add_event(Event(file_version="brain.Event:2"), first_step)
        self._file.add_event(Event(session_log=SessionLog(status=SessionLog.START)), first_step)
        self._file.add_summary(custom_scalars(_LAYOUT), 0)
        if hyper:
            for summary in hparams(dict(hyper), dict.fromkeys(_RESULTS, 0.0)):
                self._file.add_summary(summary, 0)

    def write(self, step: int, tagged: Mapping[str, float]) -> None:
        """Write numbers by tag."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in tagged.items()]
        self._attempt(lambda: self._file.add_summary(Summary(value=values), step))

    def flush(self) -> None:
        """Bring everything written to disk."""
        self._attempt(self._file.flush)

    def close(self) -> None:
        """Flush and close."""
        self._attempt(self._file.close)

    def _attempt(self, write: Callable[[], None]) -> None:
        """Write unless the disk was full before: TensorBoard's thread does not outlive that."""
        if self._lost:
            return
        try:
            write()
        except OSError as error:
            self._lost = True
            print(
                f"WARNING: {self._directory} cannot be written: {error}. TensorBoard gets no more "
                "points until the next start; metrics.jsonl goes on",
                file=sys.stderr,
                flush=True,
            )
