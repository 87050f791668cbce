"""Gradients added up by row, in memory that never exceeds the shard's.

Letters: R rows on this rank, V value columns, U distinct rows of one addition or of all.
"""

from __future__ import annotations

import torch
from torch import Tensor


class RowSum:
    """The sum of sparse row gradients; touches what is added, not the shard.

    A first addition is kept as it is. From the second on every row met has a slot in a buffer that
    doubles when it is full, up to R slots. Each addition names a row once, so the order of the
    additions is that of the calls, on CUDA too.

    Args:
        num_rows: R.
        width: V.
        device: of what is added.
    """

    def __init__(self, num_rows: int, width: int, device: torch.device) -> None:
        self.num_rows = num_rows
        self._empty = torch.empty(0, dtype=torch.int64, device=device)
        self._no_grad = torch.empty((0, width), dtype=torch.float32, device=device)
        self._reset()

    def _reset(self) -> None:
        self._rows_U = self._empty
        self._buffer_SV = self._no_grad  # the first _count slots are in use
        self._count = 0
        self._slots_R: Tensor | None = None  # -1 = no slot; None while row i of _rows_U is slot i

    @property
    def num_bytes(self) -> int:
        """What is held between additions."""
        held = [self._rows_U, self._buffer_SV] + ([] if self._slots_R is None else [self._slots_R])
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def add(self, rows_U: Tensor, grad_UV: Tensor) -> None:
        """Add ``grad_UV`` (fp32) to distinct ascending ``rows_U``; both may be kept."""
        if self._count == 0:
            self._rows_U, self._buffer_SV, self._count = rows_U, grad_UV, rows_U.numel()
            return
        slots_R = self._open_slots()
        slots_U = slots_R.index_select(0, rows_U)
        new_U = rows_U[slots_U < 0]
        if new_U.numel():
            end = self._count + new_U.numel()
            slots_R[new_U] = torch.arange(self._count, end, dtype=torch.int32, device=new_U.device)
            self._grow(end)
            slots_U = slots_R.index_select(0, rows_U)
        self._buffer_SV.index_add_(0, slots_U, grad_UV)

    def take(self) -> tuple[Tensor, Tensor]:
        """Distinct ascending rows (U,) int64 and their sums (U, V) fp32; begins anew."""
        rows_U, sums_UV = self._rows_U, self._buffer_SV
        if self._slots_R is not None:
            rows_U = (self._slots_R >= 0).nonzero().view(-1)
            sums_UV = sums_UV.index_select(0, self._slots_R.index_select(0, rows_U))
        self._reset()
        return rows_U, sums_UV

    def _open_slots(self) -> Tensor:
        if self._slots_R is None:
            device = self._rows_U.device
            self._slots_R = torch.full((self.num_rows,), -1, dtype=torch.int32, device=device)
            self._slots_R[self._rows_U] = torch.arange(
                self._count, dtype=torch.int32, device=device
            )
            self._rows_U = self._empty
        return self._slots_R

    def _grow(self, count: int) -> None:
        """Make room for ``count`` slots; those beyond the old ones hold zeros."""
        old_SV, self._count = self._buffer_SV, count
        if count <= len(old_SV):
            return
        size = min(self.num_rows, max(count, 2 * len(old_SV)))
        self._buffer_SV = old_SV.new_zeros((size, old_SV.shape[1]))
        self._buffer_SV[: len(old_SV)] = old_SV
