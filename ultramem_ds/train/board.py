"""TensorBoard's view of a run: tags grouped for the eye, a page that compares runs, parameters.

One event per call holds all of its numbers: a tenth of the cost of one event per number.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import FileWriter
from torch.utils.tensorboard.summary import custom_scalars, hparams

from ultramem_ds.config.load import to_dict
from ultramem_ds.config.schema import Config
from ultramem_ds.model.accounting import count

# Key of metrics.jsonl -> (tag, factor to the tag's unit).
_TAGS: dict[str, tuple[str, float]] = {
    "loss": ("loss/train", 1.0),
    "aux_loss": ("loss/memory_auxiliary", 1.0),
    "balance_loss": ("loss/expert_balance", 1.0),
    "grad_norm": ("grad_norm/total", 1.0),
    "grad_norm_dense": ("grad_norm/dense", 1.0),
    "grad_norm_tables": ("grad_norm/tables", 1.0),
    "lr": ("learning_rate/dense", 1.0),
    "lr_values": ("learning_rate/tables", 1.0),
    "tokens_per_s": ("throughput/tokens_per_s", 1.0),
    "model_flops_per_s": ("throughput/model_gflops_per_s", 1e-9),
    "mfu": ("throughput/model_flops_utilisation", 1.0),
    "step_time_s": ("throughput/step_ms", 1e3),
    "tokens": ("throughput/tokens", 1.0),
    "memory_bytes": ("memory_mb/current", 1e-6),
    "peak_memory_bytes": ("memory_mb/peak", 1e-6),
}
# First part of a key with a slash -> (group, factor).
_GROUPS: dict[str, tuple[str, float]] = {
    "time_s": ("time_ms", 1e3),
    "wire_bytes": ("wire_mb", 1e-6),
    "data": ("data_share", 1.0),
}
OTHER = "guards"  # keys without a place of their own: counters of the guards

# Page "Custom scalars": charts that hold every run, by what one asks of them.
_LAYOUT = {
    "1 Quality": {
        "training loss (nats per token)": ["Multiline", ["loss/train"]],
        "validation loss (nats per token)": ["Multiline", ["validation/all"]],
        "validation loss by subset": ["Multiline", [r"validation/(?!all$).*"]],
    },
    "2 Stability": {
        "gradient norm before clipping": ["Multiline", ["grad_norm/total"]],
        "gradient norm by kind of parameter": ["Multiline", [r"grad_norm/(dense|tables)"]],
        "learning rates": ["Multiline", [r"learning_rate/.*"]],
    },
    "3 Speed": {
        "tokens per second": ["Multiline", ["throughput/tokens_per_s"]],
        "model FLOPs utilisation": ["Multiline", ["throughput/model_flops_utilisation"]],
        "time by phase (ms per step, rank 0)": ["Multiline", [r"time_ms/.*"]],
        "memory of rank 0 (MB)": ["Multiline", [r"memory_mb/.*"]],
        "table traffic of rank 0 (MB per step)": ["Multiline", ["wire_mb/total"]],
    },
    "4 Sparse parts": {
        "rows of the tables touched": ["Multiline", [r"memory_layers/rows_touched/.*"]],
        "recall of the top-m search": ["Multiline", [r"memory_layers/recall/.*"]],
        "busiest expert / mean": ["Multiline", [r"expert_load/busiest/.*"]],
    },
    "5 Data": {"realised share of each subset": ["Multiline", [r"data_share/.*"]]},
}

# What the page "HParams" compares; runs of all kinds have all of them.
_RESULTS = ("validation/all", "loss/train", "throughput/tokens_per_s", "memory_mb/peak")


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of ``metrics.jsonl`` by tag.

    Lists by expert become each block's busiest and idlest expert over the mean; text is left out.
    """
    tagged: dict[str, float] = {}
    for key, value in record.items():
        if key == "expert_share":
            for block, shares in enumerate(value):
                mean = max(sum(shares) / len(shares), 1e-12)
                tagged[f"expert_load/busiest/block_{block}"] = max(shares) / mean
                tagged[f"expert_load/idlest/block_{block}"] = min(shares) / mean
        elif key != "step" and isinstance(value, int | float):
            tag, factor = _place(key)
            tagged[tag] = value * factor
    return tagged


def _place(key: str) -> tuple[str, float]:
    if key in _TAGS:
        return _TAGS[key]
    head, _, rest = key.partition("/")
    if head.startswith("layer_"):
        return f"memory_layers/{rest}/{head}", 1.0
    if head in _GROUPS:
        group, factor = _GROUPS[head]
        return f"{group}/{rest}", factor
    return (key if rest else f"{OTHER}/{key}"), 1.0


def hyper_parameters(config: Config, world_size: int) -> dict[str, bool | str | float | int]:
    """The settings that runs are compared by, the same names for every kind of model."""
    size, values = count(config), to_dict(config)
    chosen: dict[str, bool | str | float | int] = {
        "preset": config.preset,
        "kind": config.model.kind,
        "params": size.params,
        "flops_per_token": size.flops_per_token,
        "world_size": world_size,
    }
    keys = (
        "model.hidden_size model.num_layers model.seq_len model.dropout memory.knum "
        "memory.partition moe.num_experts optim.lr optim.weight_decay train.global_batch_size "
        "train.max_steps train.precision train.seed"
    )
    own_section = {"memory": config.has_memory, "moe": config.model.kind == "moe"}
    for key in keys.split():
        section, name = key.split(".")
        value = values[section][name]
        # A column has one type in all runs: 0 or "-" where the kind has no such thing.
        absent: str | int = "-" if isinstance(value, str) else 0
        chosen[key] = value if own_section.get(section, True) else absent
    return chosen


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
        self._file.add_summary(Summary(value=values), step)

    def flush(self) -> None:
        """Bring everything written to disk."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
