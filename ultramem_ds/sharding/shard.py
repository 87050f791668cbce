"""The piece of one value table that this rank holds, and the gradient that gathers on it.

Letters: R rows on this rank, V value columns on this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ultramem_ds.kernels.hugepages import resident_zeros
from ultramem_ds.sharding.comm import Comm
from ultramem_ds.sharding.table_plan import ShardLayout, TableSpec


@dataclass(frozen=True)
class OpenShard:
    """What one lookup reads of a shard, and where its backward accumulates.

    Attributes:
        values_RV: rows, detached from any graph.
        rows: the rows asked for, as row numbers of ``values_RV``.
        grad_sink_RV: fp32 and up, of the shape of ``values_RV``; None under no_grad.
    """

    values_RV: Tensor
    rows: Tensor
    grad_sink_RV: Tensor | None


class TableShard:
    """One rank's block of a table: values read where they live, gradient summed in fp32.

    The values belong to somebody else (under ZeRO-3 to ``param.ds_tensor``, which may move), so
    they are asked for on every use. The gradient is the *sum* over the tokens of all ranks that
    share this copy of the table and over all backward passes since ``zero_gradient``; whoever
    publishes it to an optimizer scales it.

    Args:
        spec: the whole table.
        layout: which block of it this is.
        read: returns this rank's values, any shape with layout.shape's number of elements.
        replicas: the ranks that hold the same block in other copies of the table.
    """

    def __init__(
        self, spec: TableSpec, layout: ShardLayout, read: Callable[[], Tensor], replicas: Comm
    ) -> None:
        self.spec = spec
        self.layout = layout
        self.replicas = replicas
        self._read = read
        self._grad_RV: Tensor | None = None
        self._lend_buffer: Callable[[], Tensor] | None = None

    def borrow_gradient(self, lend: Callable[[], Tensor]) -> None:
        """Accumulate where the optimizer reads, from the next step on: one buffer, no copy.

        Args:
            lend: returns the buffer, fp32 and of ``layout.shape``'s number of elements; asked for
                once per optimizer step, its content is overwritten.
        """
        self._lend_buffer = lend
        self._grad_RV = None

    @property
    def borrows_gradient(self) -> bool:
        """Whether the optimizer reads the gradient where it accumulates."""
        return self._lend_buffer is not None

    def values(self) -> Tensor:
        """values_RV, this rank's block in the parameter's dtype, detached from any graph."""
        return self._read().detach().view(self.layout.shape)

    def own_values(self) -> Tensor:
        """:meth:`values` without the rows that pad the table."""
        return self.values()[: self.layout.block(self.spec).num_rows]

    @property
    def grad_RV(self) -> Tensor:
        """The accumulation buffer (R, V), fp32 (fp64 for an fp64 table); zeros at first use."""
        if self._grad_RV is None and self._lend_buffer is not None:
            self._grad_RV = self._lend_buffer().view(self.layout.shape).zero_()
        elif self._grad_RV is None:
            values = self._read()
            dtype = torch.promote_types(values.dtype, torch.float32)
            self._grad_RV = resident_zeros(self.layout.shape, dtype, values.device)
        assert self._grad_RV is not None
        return self._grad_RV

    def open(self, rows: Tensor) -> OpenShard:
        """Begin a lookup of ``rows`` (int64, any shape), numbered within this shard."""
        sink = self.grad_RV if torch.is_grad_enabled() else None
        return OpenShard(self.values(), rows, sink)

    def close(self) -> None:
        """A lookup that was opened for training has had its backward."""

    def reduced_gradient(self) -> Tensor:
        """``grad_RV`` summed over all copies of the table, in place: over all tokens of all ranks.

        A collective; once per optimizer step, before the gradient is published.
        """
        return self.replicas.all_reduce_(self.grad_RV)

    def zero_gradient(self) -> None:
        """Empties the buffer, to be called once its content has been published."""
        if self.borrows_gradient:
            self._grad_RV = None
        elif self._grad_RV is not None:
            self._grad_RV.zero_()

    def release_gradient(self) -> None:
        """Leaves the buffer to whoever has it; the next lookup makes a new one."""
        self._grad_RV = None
