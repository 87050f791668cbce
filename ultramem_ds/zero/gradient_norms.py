"""The global gradient norm's parts: tables, and everything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class GradientNorms:
    """Splits ZeRO-3's global gradient norm into that of tables and that of the rest.

    ZeRO-3 computes one norm per group of parameters and combines them; tables have groups of their
    own. Looking at the list costs a few scalars per step: no pass over gradients, no communication.
    The other stages have no tables: there the whole norm is that of the rest.

    Args:
        engine: a DeepSpeed engine.
        joined_norm: norm of the tables that DeepSpeed does not see, those that are stepped by row;
            None if there are none.
    """

    def __init__(self, engine: Any, joined_norm: Callable[[], Tensor] | None = None) -> None:
        self._joined_norm = joined_norm
        self._tables: list[Tensor] = []
        self._rest: list[Tensor] = []
        zero = engine.optimizer
        if not hasattr(zero, "_get_norm_groups"):
            return
        is_table = [
            any(getattr(param, "role", None) == "table" for param in group)
            for group in zero.fp16_groups
        ]
        norm_groups = zero._get_norm_groups

        def observed() -> list[Tensor]:
            norms: list[Tensor] = norm_groups()
            self._rest = [n for n, table in zip(norms, is_table) if not table]
            self._tables = [n for n, table in zip(norms, is_table) if table]
            if self._joined_norm is not None:
                self._tables.append(self._joined_norm())
            return norms

        zero._get_norm_groups = observed

    def read(self) -> dict[str, float]:
        """``grad_norm_dense`` and ``grad_norm_tables`` of the last step; empty without tables."""
        if not self._tables:
            return {}
        parts = [_combine(self._rest), _combine(self._tables)]
        rest, tables = torch.stack([part.to(parts[0].device) for part in parts]).tolist()
        return {"grad_norm_dense": rest, "grad_norm_tables": tables}


def _combine(norms: list[Tensor]) -> Tensor:
    """One norm, where the first is: under offload they may lie on two devices."""
    device = norms[0].device
    return torch.stack([norm.float().to(device) for norm in norms]).norm()
