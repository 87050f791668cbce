"""An exported ``config.json`` and the training configuration it comes from (docs/export.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ultramem_ds.config.load import from_dict
from ultramem_ds.config.schema import Config, MemoryConfig

FORMAT_VERSION = 1
MODEL_TYPE = "ultramem"
AUTO_MAP = {
    "AutoConfig": "configuration_ultramem.UltraMemConfig",
    "AutoModel": "modeling_ultramem.UltraMemModel",
    "AutoModelForCausalLM": "modeling_ultramem.UltraMemForCausalLM",
}

# Keys of ``config.json`` and of ``ModelConfig`` that say the same.
_MODEL_KEYS = {
    "kind": "kind",
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "inner_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "norm_type": "norm",
    "norm_eps": "norm_eps",
    "max_position_embeddings": "seq_len",
    "dropout": "dropout",
    "initializer_range": "init_std",
    "embedding_initializer_range": "embedding_std",
}
# Keys of ``MemoryConfig``, ``memory_`` in front of them in ``config.json``.
_MEMORY_KEYS = (
    "knum",
    "kdim",
    "value_dim",
    "top_m",
    "num_heads",
    "retrieval",
    "tucker_rank",
    "num_cores",
    "expansion",
    "candidates",
    "query",
    "query_conv",
    "qk_norm",
    "softmax",
    "value_proj",
    "shuffle",
    "aux_loss_weight",
    "aux_loss_margin",
)
_MOE_KEYS = {
    "num_experts": "num_experts",
    "num_experts_per_tok": "top_k",
    "router_aux_loss_coef": "balance_loss_weight",
}


def hf_config(
    config: Config, *, dtype: str, tokenizer_vocab_size: int, eos_id: int, table_parts: int
) -> dict[str, Any]:
    """Contents of ``config.json``.

    Args:
        config: of the run.
        dtype: torch's name of the exported dtype.
        tokenizer_vocab_size: entries of the tokenizer.
        eos_id: its end-of-text id.
        table_parts: tensors that every table is cut into.
    """
    model = config.model
    values: dict[str, Any] = {
        "architectures": ["UltraMemForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": AUTO_MAP,
        "format_version": FORMAT_VERSION,
        "dtype": dtype,
        **{theirs: getattr(model, ours) for theirs, ours in _MODEL_KEYS.items()},
        "tokenizer_vocab_size": tokenizer_vocab_size,
        "num_key_value_heads": model.num_heads,
        "head_dim": model.head_dim,
        "hidden_act": "gelu",
        "attention_dropout": model.dropout,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "use_cache": True,
        "tie_word_embeddings": False,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "pad_token_id": eos_id,
        "layer_types": ["full_attention"] * model.num_layers,
        "memory_spans": [],
    }
    if model.kind == "moe":
        values |= {theirs: getattr(config.moe, ours) for theirs, ours in _MOE_KEYS.items()}
    if config.has_memory:
        values |= _memory_values(config.memory, model.num_layers)
        values["memory_table_parts"] = table_parts
    return values


def _memory_values(memory: MemoryConfig, num_layers: int) -> dict[str, Any]:
    starts = [a for a, _ in memory.spans] if memory.query_conv > 1 else []
    return {
        **{f"memory_{key}": getattr(memory, key) for key in _MEMORY_KEYS},
        "memory_spans": [list(span) for span in memory.spans],
        "layer_types": [
            "hybrid" if block in starts else "full_attention" for block in range(1, num_layers + 1)
        ],
        "number_of_conv_states": max((starts.count(a) for a in starts), default=1),
    }


def training_config(values: Mapping[str, Any], run: Mapping[str, Any] | None) -> Config:
    """The training configuration of an exported model.

    Args:
        values: ``config.json``; decides the architecture.
        run: the exported run's resolved configuration, which decides all else; None takes the
            schema's defaults.

    Raises:
        ValueError: it is no configuration of this format.
    """
    check_format(values)
    try:
        model = {ours: values[theirs] for theirs, ours in _MODEL_KEYS.items()}
        model["rope_theta"] = values["rope_parameters"]["rope_theta"]
        sections: dict[str, dict[str, Any]] = {"model": model}
        if values["kind"] == "moe":
            sections["moe"] = {ours: values[theirs] for theirs, ours in _MOE_KEYS.items()}
        if values["memory_spans"]:
            sections["memory"] = {key: values[f"memory_{key}"] for key in _MEMORY_KEYS}
            spans = "/".join(f"{a}:{b}" for a, b in values["memory_spans"])
            sections["memory"]["placement"] = spans
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"it lacks or garbles {error} of format {FORMAT_VERSION}") from None
    if run is None:
        return from_dict({"preset": "imported", **sections})
    merged = {key: value if key == "preset" else dict(value) for key, value in run.items()}
    for name, section in sections.items():
        merged[name] = {**merged[name], **section}
    return from_dict(merged)


def check_format(values: Mapping[str, Any]) -> None:
    """Refuse what is no exported configuration, or is of a newer format.

    Raises:
        ValueError: saying which.
    """
    if values.get("model_type") != MODEL_TYPE:
        raise ValueError(f"model_type is {values.get('model_type')!r}, not {MODEL_TYPE!r}")
    version = values.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise ValueError(f"format_version is {version!r}, not a version of this format")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"format_version {version} is newer than {FORMAT_VERSION}, the last this program "
            "reads: update ultramem_ds, or export again with this version"
        )
