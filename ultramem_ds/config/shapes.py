"""Building blocks of presets: Tables 4 and 6 as data, and how a kind is written down.

``Overrides`` map section -> key -> value over the defaults of ``config/schema.py``; only what
differs from those defaults is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

Overrides: TypeAlias = Mapping[str, Mapping[str, Any]]


def merge(*parts: Overrides) -> dict[str, dict[str, Any]]:
    """Merge section by section; later parts win."""
    merged: dict[str, dict[str, Any]] = {}
    for part in parts:
        for section, values in part.items():
            merged.setdefault(section, {}).update(values)
    return merged


def size(hidden: int, num_layers: int, num_heads: int, lr: float) -> Overrides:
    """A dense shape with Table 4's learning rate."""
    model = dict(hidden_size=hidden, num_layers=num_layers, num_heads=num_heads)
    return {"model": {**model, "inner_size": 4 * hidden}, "optim": {"lr": lr}}


# Table 6's dense shapes with Table 4's learning rates; the rest of Table 4 is the schema's default.
SIZE_151M = size(1024, 12, 16, 6e-4)
SIZE_680M = size(1536, 24, 16, 2.5e-4)
SIZE_1_6B = size(2048, 32, 16, 2e-4)
SIZE_6_5B = size(4096, 32, 32, 1.2e-4)

# 1-based a:b pairs of Appendix E.
SPANS_151M = "3:5/6:8/9:11"
SPANS_680M = "3:7/8:12/13:17/18:22"
SPANS_1_6B = "3:7/8:12/13:17/18:22/23:27/28:32"

# PKM as published by Lample et al. (2019), in parallel with the MLP of its block.
PKM: Overrides = {
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


def moe(inner_size: int, num_experts: int) -> Overrides:
    """Mixture of experts, two per token."""
    return {
        "model": {"kind": "moe", "inner_size": inner_size},
        "moe": {"num_experts": num_experts, "top_k": 2},
    }


def pkm(placement: str, top_m: int, num_heads: int, kdim: int, knum: int, width: int) -> Overrides:
    """One PKM layer with Table 6's sizes."""
    memory = dict(placement=placement, top_m=top_m, num_heads=num_heads, kdim=kdim, knum=knum)
    return merge(PKM, {"memory": {**memory, "value_dim": width}})


def ultramem(placement: str, top_m: int, kdim: int, knum: int, value_dim: int) -> Overrides:
    """UltraMem layers with Table 6's sizes."""
    memory = dict(placement=placement, top_m=top_m, kdim=kdim, knum=knum, value_dim=value_dim)
    return {"model": {"kind": "ultramem"}, "memory": memory}


# CPU-sized: seconds per run; equal FLOPs within 1% and equal parameters within 2% for the three
# sparse kinds, about 7 times dense-debug's parameters. Every width divides by 4 ranks.
DEBUG: Overrides = {
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
