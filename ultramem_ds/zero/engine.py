"""The DeepSpeed engine around a finished model, and the optimizer that it is given."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch

from ultramem_ds.config.deepspeed import zero_stage
from ultramem_ds.config.schema import Config
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.model.transformer import Block
from ultramem_ds.optim.adamw import AdamW
from ultramem_ds.optim.param_groups import build_param_groups
from ultramem_ds.zero.deepspeed_import import deepspeed, without_compiler
from ultramem_ds.zero.in_place import step_in_place
from ultramem_ds.zero.tables import Zero3Tables

# It is torch's own, which DeepSpeed knows.
deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS.append(AdamW)


def start_engine(
    model: LanguageModel,
    config: Config,
    engine_config: dict[str, Any],
    tables: Zero3Tables | None,
) -> Any:
    """Sort parameters into optimizer groups by role, and let DeepSpeed take over.

    Args:
        model: built, initialised, tables installed.
        config: resolved configuration.
        engine_config: complete, as for ``deepspeed.initialize``.
        tables: the model's value tables, which stay partitioned from here on.

    Returns:
        The DeepSpeed engine.
    """
    groups: list[Any] = list(build_param_groups(model.named_parameters(), config.optim))
    if config.model.kind == "moe":
        groups = deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer(groups)
        groups = [group for group in groups if group["params"]]
    if zero_stage(engine_config) == 3:
        # A block is gathered whole: ZeRO-3's hooks on each of its ten modules cost more than they
        # save. Safe for a module whose parameters all meet its input: their gradients are there
        # when the input's is, which is when DeepSpeed takes them.
        deepspeed.utils.set_z3_leaf_modules(model, [Block])
    with contextlib.redirect_stdout(sys.__stderr__), without_compiler():
        engine, _, _, _ = deepspeed.initialize(
            model=model,
            optimizer=make_optimizer(groups, config, engine_config),
            config=engine_config,
            dist_init_required=False,
        )
    if zero_stage(engine_config) == 3:
        step_in_place(engine.optimizer)
    if tables is not None:
        tables.keep_partitioned(engine)
    return engine


def make_optimizer(
    groups: list[Any], config: Config, engine_config: dict[str, Any]
) -> torch.optim.Optimizer:
    """AdamW over role groups: DeepSpeed's CPU kernel under offload, torch's otherwise."""
    optim = config.optim
    settings: dict[str, Any] = dict(lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    offload = engine_config.get("zero_optimization", {}).get("offload_optimizer", {})
    if offload.get("device", "none") != "none":
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    # Fused on the CPU too: one pass over each buffer where the plain loop makes about ten.
    return AdamW(groups, fused=True, **settings)
