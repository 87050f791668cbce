"""Activation checkpointing: blocks keep their inputs and run again in the backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from ultramem_ds.model.lm import LanguageModel


def recompute_blocks(model: LanguageModel) -> None:
    """From here on the blocks of ``model`` are recomputed in training; its lookups never are."""
    model.run_block = _recompute


def _recompute(block: nn.Module, *inputs: Any) -> Any:
    if torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)
