"""Presets as data: Tables 2, 4, 5 and 6 of the paper, and CPU-sized debug models.

A preset is a mapping section -> key -> value over the defaults of ``config/schema.py``; only what
differs from those defaults is written here. Table 6's two misprints are corrected:
UltraMem-151M-x10 has knum 1000 and PKM-1.6B-x12 knum 3077 (docs/memory-layer.md).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from ultramem_ds.config.schema import (
    Config,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    TrainConfig,
)

Overrides = Mapping[str, Mapping[str, Any]]

_SECTIONS = {
    "model": ModelConfig,
    "memory": MemoryConfig,
    "moe": MoEConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
    "data": DataConfig,
}


def _merge(*parts: Overrides) -> dict[str, dict[str, Any]]:
    """Merge section by section; later parts win."""
    merged: dict[str, dict[str, Any]] = {}
    for part in parts:
        for section, values in part.items():
            merged.setdefault(section, {}).update(values)
    return merged


def _size(hidden: int, num_layers: int, num_heads: int, lr: float) -> Overrides:
    model = dict(hidden_size=hidden, num_layers=num_layers, num_heads=num_heads)
    return {"model": {**model, "inner_size": 4 * hidden}, "optim": {"lr": lr}}


# Table 6's dense shapes with Table 4's learning rates; the rest of Table 4 is the schema's default.
_151M = _size(1024, 12, 16, 6e-4)
_680M = _size(1536, 24, 16, 2.5e-4)
_1_6B = _size(2048, 32, 16, 2e-4)
_6_5B = _size(4096, 32, 32, 1.2e-4)

# 1-based a:b pairs of Appendix E.
_SPANS_151M = "3:5/6:8/9:11"
_SPANS_680M = "3:7/8:12/13:17/18:22"
_SPANS_1_6B = "3:7/8:12/13:17/18:22/23:27/28:32"

# PKM as published by Lample et al. (2019), in parallel with the MLP of its block.
_PKM: Overrides = {
    "model": {"kind": "pkm"},
    "memory": {
        "retrieval": "product-key",
        "tucker_rank": 1,
        "num_cores": 1,
        "expansion": 1,
        "query": "per-head",
        "query_conv": 0,
        "qk_norm": "none",
        "softmax": True,
        "value_proj": False,
        "shuffle": "none",
        "init": "pkm",
    },
    "optim": {"value_lr_schedule": "constant"},
}


def _moe(inner_size: int, num_experts: int) -> Overrides:
    return {
        "model": {"kind": "moe", "inner_size": inner_size},
        "moe": {"num_experts": num_experts, "top_k": 2},
    }


def _pkm(placement: str, top_m: int, num_heads: int, kdim: int, knum: int, width: int) -> Overrides:
    memory = dict(placement=placement, top_m=top_m, num_heads=num_heads, kdim=kdim, knum=knum)
    return _merge(_PKM, {"memory": {**memory, "value_dim": width}})


def _ultramem(placement: str, top_m: int, kdim: int, knum: int, value_dim: int) -> Overrides:
    memory = dict(placement=placement, top_m=top_m, kdim=kdim, knum=knum, value_dim=value_dim)
    return {"model": {"kind": "ultramem"}, "memory": memory}


# Table 2, row by row: (preset, what the row changes with respect to the row before). The first row
# is PKM-151M-x10; the kind is "ultramem" throughout, so that a row differs in one group of keys.
ABLATION_ROWS: tuple[tuple[str, Overrides], ...] = (
    (
        "ablation-00-pkm",
        _merge(
            _151M,
            _pkm("6:6", top_m=16, num_heads=6, kdim=816, knum=1224, width=1024),
            {"model": {"kind": "ultramem"}},
            # Section 5.4: LR 1.2e-4, 500 B tokens.
            {"optim": {"lr": 1.2e-4}, "train": {"max_steps": 119_209}},
        ),
    ),
    ("ablation-01-rm-softmax", {"memory": {"softmax": False}}),
    (
        "ablation-02-half-vdim-proj",
        {"memory": {"value_dim": 512, "value_proj": True, "knum": 1728, "top_m": 32}},
    ),
    ("ablation-03-share-query", {"memory": {"query": "per-head-shared-sides"}}),
    (
        "ablation-04-split-skip",
        {
            "memory": {
                "placement": _SPANS_151M,
                "knum": 1000,
                "num_heads": 2,
                "kdim": 500,
                "top_m": 16,
            }
        },
    ),
    ("ablation-05-qk-norm", {"memory": {"qk_norm": "layernorm"}}),
    ("ablation-06-ive", {"memory": {"expansion": 4, "shuffle": "bijection"}}),
    ("ablation-07-tdqkr", {"memory": {"retrieval": "tdqkr", "tucker_rank": 2, "kdim": 250}}),
    ("ablation-08-mcs", {"memory": {"num_cores": 2}}),
    ("ablation-09-improved-init", {"memory": {"init": "paper"}}),
    ("ablation-10-value-lr-decay", {"optim": {"value_lr_schedule": "decay"}}),
    ("ablation-11-query-conv", {"memory": {"query_conv": 4}}),
)


def _ablation() -> dict[str, Overrides]:
    """Accumulate ``ABLATION_ROWS`` from the first row on."""
    presets: dict[str, Overrides] = {}
    current: Overrides = {}
    for name, change in ABLATION_ROWS:
        current = _merge(current, change)
        presets[name] = current
    return presets


# CPU-sized: seconds per run; equal FLOPs within 1% and equal parameters within 2% for the three
# sparse kinds, about 7 times dense-debug's parameters. Every width divides by 4 ranks.
_DEBUG: Overrides = {
    "model": {
        "hidden_size": 128,
        "inner_size": 512,
        "num_layers": 4,
        "num_heads": 4,
        "vocab_size": 4096,
        "seq_len": 128,
        "dropout": 0.0,
        "init_std": 0.088,  # 1 / sqrt(hidden size); 0.02 is that of about 2,500
    },
    "optim": {"lr": 2e-3, "value_lr": 1e-2},
    "train": {
        "global_batch_size": 16,
        "max_steps": 200,
        "precision": "fp32",
        "eval_every": 100,
        "eval_sequences": 64,
        "save_every": 100,
    },
}

_DATA: dict[str, Overrides] = {
    "dense-151m": _151M,
    "dense-680m": _680M,
    "dense-1.6b": _1_6B,
    "dense-6.5b": _6_5B,
    "moe-151m-2in32": _merge(_151M, _moe(2528, 32)),
    "moe-680m-2in33": _merge(_680M, _moe(3584, 33)),
    "moe-1.6b-2in34": _merge(_1_6B, _moe(4672, 34)),
    "ultramem-151m-x10": _merge(_151M, _ultramem(_SPANS_151M, 16, 256, 1000, 512)),
    "ultramem-151m-x12": _merge(_151M, _ultramem(_SPANS_151M, 16, 256, 1100, 512)),
    "ultramem-680m-x12": _merge(_680M, _ultramem(_SPANS_680M, 35, 384, 1632, 768)),
    "ultramem-1.6b-x12": _merge(_1_6B, _ultramem(_SPANS_1_6B, 42, 448, 1792, 1024)),
    "pkm-151m-x12": _merge(_151M, _pkm("6:6", 16, 6, 512, 1347, 1024)),
    "pkm-680m-x12": _merge(_680M, _pkm("12:12", 35, 8, 768, 2308, 1536)),
    "pkm-1.6b-x12": _merge(_1_6B, _pkm("16:16", 42, 12, 896, 3077, 2048)),
    **_ablation(),
    "dense-debug": _DEBUG,
    "pkm-debug": _merge(_DEBUG, _pkm("3:3", 8, 4, 64, 192, 128)),
    "moe-debug": _merge(_DEBUG, _moe(336, 16)),
    "ultramem-debug": _merge(_DEBUG, _ultramem("1:2/3:4", 8, 16, 192, 64)),
}

PRESETS: tuple[str, ...] = tuple(_DATA)


def preset(name: str) -> Config:
    """Build the configuration of the preset ``name``.

    Args:
        name: One of ``PRESETS``.

    Returns:
        The full configuration, every default filled in.

    Raises:
        ValueError: ``name`` is no preset; the message names the nearest one.
    """
    if name not in _DATA:
        nearest = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)
        raise ValueError(f"unknown preset {name!r}: did you mean {nearest[0]!r}? See `count`.")
    data = _DATA[name]
    sections = {key: cls(**data.get(key, {})) for key, cls in _SECTIONS.items()}
    return Config(preset=name, **sections)
