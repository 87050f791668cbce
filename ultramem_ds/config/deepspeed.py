"""From a file of ``ds_configs/`` to the dict that ``deepspeed.initialize`` gets.

The JSON files say what is a choice (ZeRO stage, offload, buckets). This module fills in what
follows from the run's configuration and world size: batch sizes, accumulation, precision, clipping.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultramem_ds.config.schema import Config, Kind

CONFIG_DIR = Path(__file__).resolve().parents[1] / "ds_configs"

_DEFAULT_FILE: dict[Kind, str] = {
    "dense": "dense_zero1.json",
    "pkm": "ultramem_zero3.json",
    "moe": "moe_zero2.json",
    "ultramem": "ultramem_zero3.json",
}

# What this module decides; a file that also says so must agree or leave it out.
_OWNED = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


@dataclass(frozen=True)
class BatchPlan:
    """How one optimizer step's sequences are cut up.

    Attributes:
        global_batch_size: sequences per optimizer step, all ranks.
        micro_batch_size: sequences per rank and forward.
        accumulation_steps: forwards per rank and optimizer step.
    """

    global_batch_size: int
    micro_batch_size: int
    accumulation_steps: int


def load_deepspeed_json(path: Path | None, kind: Kind) -> dict[str, Any]:
    """Read a DeepSpeed JSON, or the default one of a model kind.

    Raises:
        ValueError: if it is missing or not a JSON object.
    """
    path = _find(path) if path is not None else default_file(kind)
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"--deepspeed {path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--deepspeed {path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"--deepspeed {path} does not hold a JSON object")
    for key in ("zero_optimization", "bf16", "data_types"):
        if not isinstance(values.get(key, {}), dict):
            raise ValueError(f"--deepspeed {path}: {key} must be a JSON object")
    stage = values.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"--deepspeed {path}: zero_optimization.stage={stage!r} must be 1, 2 or 3")
    return values


def _find(path: Path) -> Path:
    """``path``, or, from any directory, the file of that name that comes with this package."""
    own = CONFIG_DIR / path.name
    named = str(path.parent) in (".", CONFIG_DIR.name)
    return own if named and not path.exists() and own.exists() else path


def default_file(kind: Kind) -> Path:
    """The file of ``ds_configs/`` that a preset uses without ``--deepspeed``."""
    return CONFIG_DIR / _DEFAULT_FILE[kind]


def zero_stage(values: dict[str, Any]) -> int:
    """The ZeRO stage that a DeepSpeed config asks for."""
    return int(values.get("zero_optimization", {}).get("stage", 0))


def offload_device(values: dict[str, Any], what: str = "offload_optimizer") -> str:
    """``none``, ``cpu`` or ``nvme``: where the optimizer state (or the parameters) live."""
    return str(values.get("zero_optimization", {}).get(what, {}).get("device", "none"))


def kept_from_offload(values: dict[str, Any], config: Config) -> str:
    """What ``offload_optimizer`` leaves on the device, in words; empty if nothing."""
    optimizer, device = config.memory.table_optimizer, offload_device(values)
    if device == "none" or not config.has_memory or optimizer == "dense":
        return ""
    return (
        f"offload_optimizer moves the state of all but value tables to {device}: "
        f"memory.table_optimizer={optimizer} keeps masters and moments where the tables are, dense "
        "would not"
    )


def check_stage(kind: Kind, stage: int) -> None:
    """Refuse combinations of model kind and ZeRO stage that cannot work.

    Raises:
        ValueError: saying which file of ``ds_configs/`` to use instead.
    """
    if kind == "moe" and stage not in (1, 2):
        raise ValueError(
            f"kind moe cannot train under ZeRO stage {stage}: DeepSpeed-MoE needs stage 1 or 2; "
            "use ds_configs/moe_zero2.json or ds_configs/moe_zero1.json"
        )
    if kind in ("ultramem", "pkm") and stage != 3:
        raise ValueError(
            f"kind {kind} cannot train under ZeRO stage {stage}: its value tables are ZeRO-3 "
            "partitioned parameters; use ds_configs/ultramem_zero3.json"
        )
    if kind == "dense" and stage not in (1, 2, 3):
        raise ValueError(f"ZeRO stage {stage} is not supported; use ds_configs/dense_zero1.json")


def engine_config(values: dict[str, Any], config: Config, batches: BatchPlan) -> dict[str, Any]:
    """Fill batch sizes, precision, clipping and dtypes into a DeepSpeed config.

    Raises:
        ValueError: if the file fixes a value that contradicts the run's configuration.
    """
    ours = dict(
        zip(
            _OWNED,
            (batches.global_batch_size, batches.micro_batch_size, batches.accumulation_steps),
        )
    )
    for key, value in ours.items():
        if values.get(key, "auto") not in ("auto", value):
            raise ValueError(
                f"the DeepSpeed JSON sets {key}={values[key]} but the run has {value}; "
                "remove the key and use train.global_batch_size / train.micro_batch_size"
            )
    for key in ("optimizer", "scheduler", "fp16"):
        if key in values:
            raise ValueError(
                f"the DeepSpeed JSON sets {key!r}; ultramem_ds builds it from optim.* and "
                "train.precision: remove the key"
            )
    bf16 = config.train.precision == "bf16"
    _refuse_contradictions(values, config)
    return {
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": offload_device(values) != "none",
        **values,
        **ours,
        "gradient_clipping": 0.0,  # zero/gate.py clips
        "bf16": {**values.get("bf16", {}), "enabled": bf16},
        "data_types": {**values.get("data_types", {}), "grad_accum_dtype": "fp32"},
    }


def _refuse_contradictions(values: dict[str, Any], config: Config) -> None:
    """What a run decides itself may stand in the file too, but not as something else.

    Raises:
        ValueError: it does; names the key of the run to set.
    """
    bf16 = config.train.precision == "bf16"
    precision = f"train.precision={config.train.precision}"
    decided: tuple[tuple[str, str, Any, str], ...] = (
        (
            "",
            "gradient_clipping",
            config.optim.clip_grad,
            f"optim.clip_grad={config.optim.clip_grad}",
        ),
        ("bf16", "enabled", bf16, precision),
        ("data_types", "grad_accum_dtype", "fp32", "gradients accumulated in fp32"),
    )
    for section, key, ours, setting in decided:
        found = (values.get(section, {}) if section else values).get(key)
        if found not in ("auto", None, ours):
            name = f"{section}.{key}" if section else key
            raise ValueError(
                f"the DeepSpeed JSON sets {name}={json.dumps(found)} but the run has {setting}; "
                f"remove the key{'' if section == 'data_types' else ' and set that of the run'}"
            )
