"""Where a running engine keeps fp32 masters and Adam's moments, by ZeRO stage."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ultramem_ds.checkpoint.state import MASTER, MOMENTS
from ultramem_ds.sharding.blocks import Block, Piece, flat_range
from ultramem_ds.zero.deepspeed_import import deepspeed
from ultramem_ds.zero.experts import is_padding


def adam_buffers(optimizer: torch.optim.Optimizer, master: Tensor) -> dict[str, Tensor]:
    """The master and its moments in ``optimizer``'s state, made of zeros where missing."""
    state = optimizer.state[master]
    for kind in MOMENTS:
        if kind not in state:
            state[kind] = torch.zeros_like(master, requires_grad=False)
    return {MASTER: master.detach(), **{kind: state[kind] for kind in MOMENTS}}


class Moments(NamedTuple):
    """Adam's moments of one flat buffer, live, and the updates that they have seen."""

    avg: Tensor
    avg_sq: Tensor
    updates: int


def adam_moments(optimizer: torch.optim.Optimizer, master: Tensor) -> Moments | None:
    """The moments in ``optimizer``'s state, only to be read; None before the first update."""
    state = optimizer.state.get(master, {})
    if not {"step", *MOMENTS} <= state.keys():
        return None
    avg, avg_sq = (state[kind] for kind in MOMENTS)
    return Moments(avg, avg_sq, int(state["step"]))


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
        named = engine.module.named_parameters()
        self._named = [(canonical(name), p) for name, p in named if not is_padding(p)]
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

    def moments(self, index: int) -> Moments | None:
        """Those of flat buffer ``index``; None before the first update."""
        return adam_moments(self._zero.optimizer, self._masters[index])

    def set_step(self, step: int) -> None:
        """See :class:`OptimizerState`."""
        for master in self._masters:
            set_adam_step(self._zero.optimizer, master, step)

    def publish(self) -> None:
        """See :class:`OptimizerState`."""
        self._zero.update_lp_params()


class Zero3State:
    """Masters and moments under ZeRO-3: sub-groups of parameters' slices, flattened.

    Args:
        engine: a DeepSpeed engine of stage 3.
        table_blocks: what this rank holds of each value table, by ``id`` of the parameter.
    """

    def __init__(self, engine: Any, table_blocks: dict[int, Block]) -> None:
        self._zero = engine.optimizer
        self._names = {id(p): name for name, p in engine.module.named_parameters()}
        self._table_blocks = table_blocks

    @property
    def num_buffers(self) -> int:
        """See ``OptimizerState``."""
        return len(self._zero.fp16_groups)

    def pieces(self) -> list[Piece]:
        """Slices without elements of the parameter (all padding) are left out."""
        found = []
        for buffer, params in enumerate(self._zero.fp16_groups):
            offset = 0
            for param in params:
                block = self._table_blocks.get(id(param)) or flat_slice(param)
                if block.numel:
                    found.append(Piece(self._names[id(param)], buffer, offset, block))
                offset += param.partition_numel()
        return found

    @contextlib.contextmanager
    def open_buffer(self, index: int) -> Iterator[dict[str, Tensor]]:
        """See ``OptimizerState``; a buffer on NVMe is read before and written after."""
        zero = self._zero
        swapped = zero._swappable_optimizer_subgroup(index)
        if swapped:
            zero._optimizer_states_and_gradient_swap_in(index)
        yield adam_buffers(zero.optimizer, zero.fp32_partitioned_groups_flat[index])
        zero._reassign_or_swap_out_partitioned_parameters(index)
        if swapped:
            zero._optimizer_states_and_gradient_swap_out(index)

    def moments(self, index: int) -> Moments | None:
        """Those of flat buffer ``index``; None before the first update."""
        zero = self._zero
        return adam_moments(zero.optimizer, zero.fp32_partitioned_groups_flat[index])

    def set_step(self, step: int) -> None:
        """See ``OptimizerState``."""
        for index in range(self.num_buffers):
            self.set_buffer_step(index, step)

    def set_buffer_step(self, index: int, step: int) -> None:
        """The updates that one buffer has taken."""
        zero = self._zero
        set_adam_step(zero.optimizer, zero.fp32_partitioned_groups_flat[index], step)

    def buffer_step(self, index: int) -> int:
        """The updates that one buffer has taken."""
        zero = self._zero
        return int(zero.optimizer.state[zero.fp32_partitioned_groups_flat[index]].get("step", 0))

    def publish(self) -> None:
        """Gather the small parameters that ZeRO-3 keeps whole; slices follow their buffers."""
        self._zero.checkpoint_event_prologue()
        self._zero.checkpoint_event_epilogue()


def flat_slice(param: Any) -> Block:
    """This rank's elements of a parameter that ZeRO-3 cuts into equal slices, the last padded."""
    numel = param.partition_numel()
    first = param.ds_zero_partition_rank * numel
    return flat_range(first, max(0, min(numel, param.ds_numel - first)))
