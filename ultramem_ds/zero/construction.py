"""A model as it is built for ZeRO: placeholders, experts and initial values."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from torch import nn

from ultramem_ds.config.deepspeed import zero_stage
from ultramem_ds.config.schema import Config
from ultramem_ds.model.init import init_parameter
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.sharding.groups import TableGroups
from ultramem_ds.zero.experts import ExpertParallelMLP, ExpertShare, is_padding
from ultramem_ds.zero.tables import TablePlaceholder, fill_partitioned, partitioned_construction


def build_model(
    config: Config,
    engine_config: dict[str, Any],
    groups: TableGroups | None,
    experts: ExpertShare,
) -> LanguageModel:
    """The model with unset parameters: partitioned as built under ZeRO-3, whole otherwise.

    Args:
        config: resolved configuration.
        engine_config: complete, as for ``deepspeed.initialize``.
        groups: which ranks share a copy of the tables; None without memory layers.
        experts: this rank's share of the experts; none without kind moe.
    """
    make_mlp = make_table = None
    if experts.layout is not None:
        make_mlp = lambda _: ExpertParallelMLP(config, experts)  # noqa: E731
    if groups is not None:
        make_table = lambda i: TablePlaceholder(groups.shard, i)  # noqa: E731
    partitioned = zero_stage(engine_config) == 3
    construction = (
        partitioned_construction(engine_config) if partitioned else contextlib.nullcontext()
    )
    with construction, contextlib.redirect_stdout(sys.__stderr__):
        return LanguageModel(config, make_mlp, make_table)


def init_parameters(
    model: LanguageModel, config: Config, experts: ExpertShare, *, partitioned: bool
) -> None:
    """Fill every parameter but the tables from (seed, canonical name); a collective under ZeRO-3.

    Args:
        model: as :func:`build_model` returned it.
        config: resolved configuration.
        experts: this rank's share of the experts.
        partitioned: whether ZeRO-3 has partitioned the parameters.
    """
    named = [
        (experts.canonical_name(name), param)
        for name, param in model.named_parameters()
        if getattr(param, "role", None) != "table" and not is_padding(param)
    ]

    def fill(name: str, param: nn.Parameter) -> None:
        init_parameter(name, param, config, config.train.seed)

    if partitioned:
        fill_partitioned(named, fill)
        return
    for name, param in named:
        fill(name, param)
