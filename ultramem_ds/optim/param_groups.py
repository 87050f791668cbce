"""Optimizer groups by the role that parameters were tagged with when they were created."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypedDict

from torch import nn

from ultramem_ds.config.schema import OptimConfig
from ultramem_ds.optim.schedule import dense_lr, gain_lr, key_lr, query_lr, value_lr

# role of a parameter -> name of its group
_GROUP_OF_ROLE = {
    "matrix": "matrices",
    "embedding": "matrices",
    "core": "matrices",
    "norm": "norms",
    "table": "tables",
}

# group name -> learning rate of a step
SCHEDULES: dict[str, Callable[[int, int, OptimConfig], float]] = {
    "matrices": dense_lr,
    "keys": key_lr,
    "queries": query_lr,
    "norms": dense_lr,
    "gains": gain_lr,
    "tables": value_lr,
}


class ParamGroup(TypedDict):
    """One optimizer group; ``schedule`` survives DeepSpeed's renaming of MoE groups."""

    name: str
    schedule: str  # key of SCHEDULES
    params: list[nn.Parameter]
    weight_decay: float
    lr: float


def build_param_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], optim: OptimConfig
) -> list[ParamGroup]:
    """Sort trainable parameters into groups: disjoint and complete, or an error.

    What decides the memory layers' addresses (keys, queries, the gains of both) has groups of its
    own where its rates are others.

    Raises:
        ValueError: for a parameter without a known ``role``, or one that appears twice.
    """
    other_rate = {
        "memory_keys": ("keys", optim.key_lr_multiplier),
        "memory_query": ("queries", optim.query_lr_multiplier),
        "memory_conv": ("queries", optim.query_lr_multiplier),
        "memory_query_norm": ("gains", optim.gain_lr_multiplier),
        "memory_keys_norm": ("gains", optim.gain_lr_multiplier),
    }
    decay = {
        "matrices": optim.weight_decay,
        "keys": optim.weight_decay,
        "queries": optim.weight_decay,
        "tables": optim.table_weight_decay,
        "norms": optim.weight_decay if optim.decay_norms else 0.0,
        "gains": optim.weight_decay if optim.decay_norms else 0.0,
    }
    groups: dict[str, ParamGroup] = {}
    seen: dict[int, str] = {}
    for name, param in named_parameters:
        if id(param) in seen:
            raise ValueError(f"parameter {name} is also {seen[id(param)]}: groups must be disjoint")
        seen[id(param)] = name
        role = getattr(param, "role", None)
        if role not in _GROUP_OF_ROLE:
            raise ValueError(
                f"parameter {name} has role {role!r}, not one of {list(_GROUP_OF_ROLE)}"
            )
        if not param.requires_grad:
            continue
        key = _GROUP_OF_ROLE[role]
        own, multiplier = other_rate.get(getattr(param, "init", ""), (key, 1.0))
        if multiplier != 1:
            key = own
        if key not in groups:
            groups[key] = ParamGroup(
                name=key, schedule=key, params=[], weight_decay=decay[key], lr=optim.lr
            )
        groups[key]["params"].append(param)
    return [groups[key] for key in SCHEDULES if key in groups]
