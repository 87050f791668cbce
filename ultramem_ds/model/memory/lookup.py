"""The value table and the lookup that a memory layer is handed.

A memory layer knows no ranks: it calls ``Lookup.start`` and later ``PendingLookup.wait``. The local
lookup below holds the whole table; sharding replaces it with one that asks the owners of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ultramem_ds.kernels import lookup_reduce
from ultramem_ds.model.roles import tag

# T tokens, K rows per token, h cores, E projectors, N physical rows, V value width.


class PendingLookup(Protocol):
    """A lookup under way."""

    def wait(self) -> Tensor:
        """Block until done; pooled values (T, E, V)."""
        ...


class Lookup(Protocol):
    """Weighted sums of table rows per (token, projector)."""

    def start(self, rows_TK: Tensor, projectors_TK: Tensor, scores_TKh: Tensor) -> PendingLookup:
        """Begin.

        Args:
            rows_TK: Physical rows, int64 in [0, N).
            projectors_TK: Projector of each row, int64 in [0, E).
            scores_TKh: Weight of each row's h column chunks; differentiable.
        """
        ...


class ValueTable(nn.Module):
    """Owns ``weight`` (N, V). Never called: ZeRO-3 gathers the parameters of modules that are.

    Args:
        num_rows: N.
        value_dim: V.
        table_index: 0-based number of this memory layer in the model; seeds its permutation
            and rows.
    """

    def __init__(self, num_rows: int, value_dim: int, table_index: int) -> None:
        super().__init__()
        self.index = table_index
        self.weight = nn.Parameter(torch.empty(num_rows, value_dim))
        self.weight.table_index = table_index  # type: ignore[attr-defined]
        tag(self.weight, role="table", init="table")


@dataclass(frozen=True)
class FinishedLookup:
    """A lookup that was complete when it started."""

    pooled_TEV: Tensor

    def wait(self) -> Tensor:
        """Return the pooled values (T, E, V)."""
        return self.pooled_TEV


class LocalLookup:
    """The whole table on this process.

    An fp32 table's gradient is accumulated into ``weight.grad`` by the backward, without a dense
    (N, V) allocation per call; tables of other dtypes get autograd's dense gradient.
    """

    def __init__(self, table: ValueTable, num_projectors: int, kernel: str) -> None:
        self.table = table
        self.num_projectors = num_projectors
        self.kernel = kernel

    def start(self, rows_TK: Tensor, projectors_TK: Tensor, scores_TKh: Tensor) -> FinishedLookup:
        """Look up and pool at once; see ``Lookup.start``."""
        pooled_TEV = lookup_reduce(
            self.table.weight,
            rows_TK,
            projectors_TK,
            scores_TKh,
            self.num_projectors,
            grad_values_RV=self._grad_buffer(),
            kernel=self.kernel,
        )
        return FinishedLookup(pooled_TEV)

    def _grad_buffer(self) -> Tensor | None:
        """The fp32 ``weight.grad`` to accumulate into, allocated once; None where not training."""
        weight = self.table.weight
        if not (torch.is_grad_enabled() and weight.requires_grad and weight.dtype == torch.float32):
            return None
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        return weight.grad
