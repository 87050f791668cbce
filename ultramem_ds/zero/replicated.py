"""What more than one rank holds: whole parameters by ZeRO stage, and blocks of value tables."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ultramem_ds.zero.tables import Zero3Tables


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


def replicated_blocks(model: nn.Module, tables: Zero3Tables | None) -> dict[str, Tensor]:
    """This rank's blocks of value tables, by name, if other copies of the tables hold them too.

    They are the same to the last bit: the copies add their gradients in one order, and what a
    row-sparse optimizer brings up to date it brings up to date in all of them.
    """
    if tables is None or tables.shards[0].replicas.world_size == 1:
        return {}
    names = {id(param): name for name, param in model.named_parameters()}
    return {names[id(p)]: shard.values() for p, shard in zip(tables.params, tables.shards)}
