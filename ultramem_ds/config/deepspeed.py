"""From a file of ``ds_configs/`` to the dict that ``deepspeed.initialize`` gets.

The JSON files say what is a choice (ZeRO stage, offload, buckets). This module fills in what
follows from the run's configuration and world size: batch sizes, accumulation, precision, clipping.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from ultramem_ds.config.schema import Config, Kind

CONFIG_DIR = Path(__file__).resolve().parents[2] / "ds_configs"

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
    path = path or default_file(kind)
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


def default_file(kind: Kind) -> Path:
    """The file of ``ds_configs/`` that a preset uses without ``--deepspeed``."""
    return CONFIG_DIR / _DEFAULT_FILE[kind]


def zero_stage(values: dict[str, Any]) -> int:
    """The ZeRO stage that a DeepSpeed config asks for."""
    return int(values.get("zero_optimization", {}).get("stage", 0))


def offload_device(values: dict[str, Any], what: str = "offload_optimizer") -> str:
    """``none``, ``cpu`` or ``nvme``: where the optimizer state (or the parameters) live."""
    return str(values.get("zero_optimization", {}).get(what, {}).get("device", "none"))


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


def plan_batches(config: Config, world_size: int) -> BatchPlan:
    """Cut the global batch into micro-batches.

    ``train.micro_batch_size=auto`` takes the largest size that divides ``global_batch_size /
    world_size`` and whose activations fit into half of this process's share of free memory.

    Raises:
        ValueError: if the ranks and micro-batches do not divide the global batch.
    """
    G = config.train.global_batch_size
    if G % world_size:
        raise ValueError(
            f"train.global_batch_size={G} cannot be divided over {world_size} ranks; "
            f"the nearest that can is {max(1, round(G / world_size)) * world_size}"
        )
    per_rank = G // world_size
    asked = config.train.micro_batch_size
    if asked == "auto":
        limit = _free_bytes_per_rank() // 2 // activation_bytes_per_sequence(config)
        micro = max(d for d in range(1, per_rank + 1) if per_rank % d == 0 and d <= max(1, limit))
    else:
        micro = asked
    if per_rank % micro:
        raise ValueError(
            f"train.micro_batch_size={micro} does not divide train.global_batch_size={G} / "
            f"{world_size} ranks = {per_rank}"
        )
    return BatchPlan(G, micro, per_rank // micro)


def activation_bytes_per_sequence(config: Config) -> int:
    """Bytes that one sequence's activations and logits take in a training forward, estimated.

    Counts what autograd keeps of each block (inputs of norms, projections, attention, GELU) and the
    logits with their fp32 softmax; with activation checkpointing only the blocks' inputs.
    """
    model = config.model
    width = 2 if config.train.precision == "bf16" else 4
    inner = model.inner_size * (config.moe.top_k if model.kind == "moe" else 1)
    block = model.hidden_size * (1 if config.train.activation_checkpointing else 12) + (
        0 if config.train.activation_checkpointing else 2 * inner
    )
    memory = 0
    if config.has_memory:
        m = config.memory
        per_layer = m.num_heads * 2 * m.num_keys * m.tucker_rank * 4
        per_layer += m.rows_per_token * (8 + 8 + 4 * m.num_cores)
        per_layer += 4 * m.expansion * m.value_dim + 3 * m.rows_per_token * m.top_m * 4
        memory = len(m.spans) * per_layer
    per_token = model.num_layers * block * width + memory + model.vocab_size * (width + 8)
    return per_token * model.seq_len


def _free_bytes_per_rank() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available) // max(1, _local_world_size())


def _local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


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
    return {
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": offload_device(values) != "none",
        **values,
        **ours,
        "gradient_clipping": config.optim.clip_grad,
        "bf16": {**values.get("bf16", {}), "enabled": bf16},
        "data_types": {**values.get("data_types", {}), "grad_accum_dtype": "fp32"},
    }
