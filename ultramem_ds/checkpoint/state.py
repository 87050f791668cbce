"""Optimizer state of one rank, as a checkpoint sees it: flat buffers and what lies where in them.

ZeRO-1, ZeRO-2 and ZeRO-3, NVMe and the row-sparse tables all answer the same three questions: which
pieces lie here, give me a flat buffer, make the working copies follow. The answers are written into
every checkpoint as its layout, and are what loading one at another world size, scheme or stage
writes into.
"""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

from torch import Tensor

from ultramem_ds.sharding.blocks import Piece

MASTER = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (MASTER, *MOMENTS)


class OptimizerState(Protocol):
    """Flat buffers of one rank; every kind of ``KINDS`` has the same pieces at the same places."""

    @property
    def num_buffers(self) -> int:
        """Flat buffers on this rank, those without pieces included."""
        ...

    def pieces(self) -> list[Piece]:
        """What this rank holds, ordered by (buffer, offset)."""
        ...

    def open_buffer(self, index: int) -> contextlib.AbstractContextManager[dict[str, Tensor]]:
        """Flat buffer ``index`` by kind, in place; written back when the context ends.

        Moments that do not exist yet are made of zeros.
        """
        ...

    def set_step(self, step: int) -> None:
        """The number of updates taken, for Adam's bias corrections; after the buffers."""
        ...

    def publish(self) -> None:
        """Copy the masters into the parameters that the model computes with; a collective."""
        ...


class OwnState(OptimizerState, Protocol):
    """Optimizer state that DeepSpeed does not save."""

    def saved(self) -> dict[str, Any]:
        """What this rank's file holds: ``{"flats": {kind: [...]}, "step": int}``, live or read."""
        ...
