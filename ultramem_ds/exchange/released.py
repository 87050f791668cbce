"""The authors' released checkpoints (OLMo's layout) as whole models.

A directory with ``config.yaml`` (OLMo's, key ``model``) and ``model.pt``, an unsharded state dict:
``transformer.wte``, ``transformer.blocks.i``, ``transformer.ln_f``, ``transformer.ff_out``, and the
memory layers of version 1 as ``transformer.mem_blocks.j`` with the names of
:mod:`ultramem_ds.interop`. What their models may have and ours have not (gated activations, norms
on queries and keys, biases, grouped keys) is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ultramem_ds.checkpoint.parameters import parameter_records
from ultramem_ds.checkpoint.safe import safe_load
from ultramem_ds.config.load import from_dict
from ultramem_ds.config.schema import Config
from ultramem_ds.interop import (
    CORE,
    DIRECTIONS,
    KEYS,
    KEYS_PERMUTATION,
    NORMS,
    SAME_LAYOUT,
)
from ultramem_ds.sharding.blocks import Block

CONFIG = "config.yaml"
WEIGHTS = "model.pt"
_ROOT = "transformer."

# Our name -> theirs, by block.
_BLOCK = {
    "attention_norm.weight": "attn_norm.weight",
    "attention.qkv_proj.weight": "att_proj.weight",
    "attention.out_proj.weight": "attn_out.weight",
    "mlp_norm.weight": "ff_norm.weight",
    "mlp.up_proj.weight": "ff_proj.weight",
    "mlp.down_proj.weight": "ff_out.weight",
}
# Settings of theirs that would need something that our models have not; a missing one is off.
_REFUSED = (
    "alibi",
    "attention_layer_norm",
    "clip_qkv",
    "embedding_layer_norm",
    "include_bias",
    "bias_for_layer_norm",
    "norm_after",
    "scale_logits",
)


def released_config(values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Config:
    """Our configuration of a released model.

    Args:
        values: key ``model`` of ``config.yaml``.
        shapes: of the state dict, for what the configuration leaves to the code.

    Raises:
        ValueError: the model is of another family, or has what ours have not.
    """
    for key in _REFUSED:
        if values.get(key):
            raise ValueError(f"{key}={values[key]!r}: our models have no such thing")
    if values.get("activation_type", "swiglu") != "gelu":
        raise ValueError(f"activation_type={values.get('activation_type', 'swiglu')!r}, not gelu")
    if not values.get("rope"):
        raise ValueError("rope is off: our models have rotary positions")
    if values.get("n_kv_heads") not in (None, values["n_heads"]) or values.get(
        "multi_query_attention"
    ):
        raise ValueError("keys and values are shared between attention heads")
    norm = values.get("layer_norm_type", "default")
    if norm not in NORMS:
        raise ValueError(f"layer_norm_type={norm!r} is none of {', '.join(NORMS)}")
    model = {
        "kind": "dense",
        "hidden_size": values["d_model"],
        "inner_size": values.get("mlp_hidden_size") or values["d_model"] * values["mlp_ratio"],
        "num_layers": values["n_layers"],
        "num_heads": values["n_heads"],
        "vocab_size": values.get("embedding_size") or values["vocab_size"],
        "seq_len": values["max_sequence_length"],
        "norm": NORMS[norm],
        "norm_eps": float(values.get("layer_norm_eps", 1e-5)),
        "rope_theta": float(values.get("rope_theta", 10_000)),
    }
    placement = values.get("mem_insert_way", "no_mem")
    if placement == "no_mem":
        return from_dict({"preset": "released", "model": model})
    if values.get("mem_type") != "ultramem_v1":
        raise ValueError(f"mem_type={values.get('mem_type')!r}, not ultramem_v1")
    memory = {
        **_memory(values, shapes),
        "placement": _placement(placement, values["n_layers"]),
        "qk_norm": NORMS[norm],
    }
    return from_dict(
        {"preset": "released", "model": {**model, "kind": "ultramem"}, "memory": memory}
    )


def _memory(values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    layer = f"{_ROOT}mem_blocks.0."
    value_dim = values["mem_vdim"]
    cores = [name for name in shapes if name.startswith(f"{layer}tucker_core.")]
    return {
        "knum": values["mem_knum"],
        "kdim": values["mem_kdim"],
        "value_dim": value_dim,
        "top_m": values["mem_knn"],
        "num_heads": values["mem_head"],
        "tucker_rank": shapes[f"{layer}keys"][-1],
        "num_cores": len(cores),
        "expansion": shapes[f"{layer}values_proj.weight"][1] // value_dim,
        "query": "shared",
        "query_conv": 0,
        "shuffle": "stored",
    }


def _placement(text: str, num_layers: int) -> str:
    """Their blocks count from 0."""
    if text == "full":
        return "/".join(f"{block}:{block}" for block in range(1, num_layers + 1))
    pairs = (map(int, part.split(":")) for part in text.split("/"))
    return "/".join(f"{a + 1}:{b + 1}" for a, b in pairs)


class ReleasedWeights:
    """The weights of a released state dict by our names; see ``exchange.weights.Weights``.

    Args:
        state: their state dict, mapped.
        config: ours.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape.
    """

    def __init__(self, state: Mapping[str, Tensor], config: Config) -> None:
        self._state = dict(state)
        self._sources = {name: self._theirs(name, config) for name in parameter_records(config)}
        self._buffers = self._read_buffers(config)
        used = {name for names in self._sources.values() for name in names}
        for j in range(len(config.memory.spans) if config.has_memory else 0):
            layer = f"{_ROOT}mem_blocks.{j}."
            used |= {
                f"{layer}{name}" for name in ("shuffle_index", "tucker_core_u", "tucker_core_v")
            }
        if unknown := sorted(self._state.keys() - used):
            raise ValueError(f"it holds {unknown[0]}, which our model has not")
        for name, record in parameter_records(config).items():
            missing = [each for each in self._sources[name] if each not in self._state]
            if missing:
                raise ValueError(f"it holds no {missing[0]}")
            if (shape := tuple(self._whole(name).shape)) != record.shape:
                raise ValueError(f"its {self._sources[name][0]} is {shape}, not {record.shape}")

    def _theirs(self, name: str, config: Config) -> list[str]:
        """Names of what one of our parameters is made of."""
        kind, _, rest = name.partition(".")
        if kind == "embedding":
            return [f"{_ROOT}wte.weight"]
        if kind == "final_norm":
            return [f"{_ROOT}ln_f.weight"]
        if kind == "head":  # tied weights become two equal ones
            head = f"{_ROOT}ff_out.weight"
            return [head if head in self._state else f"{_ROOT}wte.weight"]
        index, _, rest = rest.partition(".")
        if kind == "blocks":
            return [f"{_ROOT}blocks.{index}.{_BLOCK[rest]}"]
        layer = f"{_ROOT}mem_blocks.{index}."
        if rest == KEYS:
            return [f"{layer}keys"]
        if rest == CORE:
            return [f"{layer}tucker_core.{i}" for i in range(config.memory.num_cores)]
        return [layer + next(theirs for theirs, ours in SAME_LAYOUT.items() if ours == rest)]

    def _read_buffers(self, config: Config) -> dict[str, Tensor]:
        buffers: dict[str, Tensor] = {}
        for j in range(len(config.memory.spans) if config.has_memory else 0):
            layer, ours = f"{_ROOT}mem_blocks.{j}.", f"memories.{j}."
            try:
                buffers[f"{ours}shuffle.index"] = self._state[f"{layer}shuffle_index"].clone()
                pair = [self._state[f"{layer}tucker_core_{side}"] for side in "uv"]
            except KeyError as error:
                raise ValueError(f"it holds no {error.args[0]}") from None
            buffers[f"{ours}{DIRECTIONS}"] = torch.stack([v[0, :, 0] for v in pair]).float()
        return buffers

    def _whole(self, name: str) -> Tensor:
        parts = [self._state[each] for each in self._sources[name]]
        if name.endswith(KEYS):
            return parts[0].permute(KEYS_PERMUTATION)
        return torch.stack(parts) if name.endswith(CORE) else parts[0]

    def buffers(self) -> dict[str, Tensor]:
        """See ``exchange.weights.Weights``."""
        return self._buffers

    def read(self, name: str, block: Block, out_RC: Tensor) -> None:
        """See ``exchange.weights.Weights``."""
        rows_RC = self._whole(name).reshape(-1, block.num_columns)
        out_RC.copy_(rows_RC[block.first_row : block.first_row + block.num_rows])


def open_released(source: Path) -> tuple[Config, ReleasedWeights]:
    """Check a released checkpoint against our model; its tensors are mapped, not read.

    Raises:
        ValueError: it is incomplete, or no model of ours.
    """
    try:
        values = yaml.safe_load((source / CONFIG).read_text())["model"]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"{source / CONFIG} is no configuration of OLMo: {error!r}") from None
    if not (source / WEIGHTS).is_file():
        raise ValueError(f"{source} has no {WEIGHTS}: sharded checkpoints are not read")
    state = safe_load(source / WEIGHTS)
    try:
        config = released_config(values, {name: tuple(t.shape) for name, t in state.items()})
        return config, ReleasedWeights(state, config)
    except KeyError as error:
        raise ValueError(f"{source}: lacks {error.args[0]!r}") from None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
