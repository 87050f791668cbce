"""Where a running engine keeps fp32 masters and Adam's moments: the same three questions to ZeRO-1,
ZeRO-2 and ZeRO-3 - which pieces lie here, give me a flat buffer, make the working copies follow.

The answers are written into every checkpoint as its layout, and are what loading one at another
world size, scheme or stage writes into.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from ultramem_ds.sharding.blocks import Piece, flat_range
from ultramem_ds.sharding.deepspeed_import import deepspeed

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


def adam_buffers(optimizer: torch.optim.Optimizer, master: Tensor) -> dict[str, Tensor]:
    """The master and its moments in ``optimizer``'s state, made of zeros where missing."""
    state = optimizer.state[master]
    for kind in MOMENTS:
        if kind not in state:
            state[kind] = torch.zeros_like(master, requires_grad=False)
    return {MASTER: master.detach(), **{kind: state[kind] for kind in MOMENTS}}


def set_adam_step(optimizer: torch.optim.Optimizer, master: Tensor, step: int) -> None:
    """Set the update count of one master: DeepSpeed's Adam counts in ints, torch's in tensors."""
    if isinstance(optimizer, deepspeed.ops.adam.DeepSpeedCPUAdam):
        optimizer.state[master]["step"] = step
        return
    device = master.device if master.device.type == "cuda" else "cpu"
    optimizer.state[master]["step"] = torch.tensor(float(step), device=device)


class Zero12State:
    """ZeRO-1, ZeRO-2 and DeepSpeed's bf16 optimizer (which is ZeRO-1 in bf16).

    Each parameter group is one flat buffer, cut into equal ranges over the ranks that replicate it
    (for experts: the ranks that hold the same ones).

    Args:
        engine: a DeepSpeed engine of stage 1 or 2.
        canonical: from the module's parameter name to the one-process model's.
    """

    def __init__(self, engine: Any, canonical: Callable[[str], str]) -> None:
        self._named = [(canonical(name), p) for name, p in engine.module.named_parameters()]
        self._zero = engine.optimizer

    @property
    def _masters(self) -> list[Tensor]:
        zero = self._zero
        if hasattr(zero, "fp32_groups_flat_partition"):  # BF16_Optimizer
            return list(zero.fp32_groups_flat_partition)
        return list(zero.single_partition_of_fp32_groups)

    @property
    def num_buffers(self) -> int:
        """See :class:`OptimizerState`."""
        return len(self._masters)

    def pieces(self) -> list[Piece]:
        """DeepSpeed links every parameter to its fragment of this rank's flat range."""
        found = []
        for name, param in self._named:
            link = param._hp_mapping
            if link is not None:
                at, inside = link.hp_fragment_address, link.lp_fragment_address
                block = flat_range(inside.start, inside.numel)
                found.append(Piece(name, link.param_group_index, at.start, block))
        return sorted(found, key=lambda piece: (piece.buffer, piece.offset))

    @contextlib.contextmanager
    def open_buffer(self, index: int) -> Iterator[dict[str, Tensor]]:
        """See :class:`OptimizerState`."""
        yield adam_buffers(self._zero.optimizer, self._masters[index])

    def set_step(self, step: int) -> None:
        """See :class:`OptimizerState`."""
        for master in self._masters:
            set_adam_step(self._zero.optimizer, master, step)

    def publish(self) -> None:
        """See :class:`OptimizerState`."""
        self._zero.update_lp_params()
