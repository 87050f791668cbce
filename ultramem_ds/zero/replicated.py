"""Which parameters every rank holds whole, by ZeRO stage."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def replicated(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that every rank holds whole, by name."""
    found: dict[str, Tensor] = {}
    param: Any
    for name, param in model.named_parameters():
        if not getattr(param, "allreduce", True):  # DeepSpeed's mark of experts
            continue
        if hasattr(param, "ds_tensor"):  # ZeRO-3: whole only if small and gathered
            whole = param.ds_persist and param.numel() == param.ds_numel
            if not whole:
                continue
        found[name] = param.detach()
    return found
