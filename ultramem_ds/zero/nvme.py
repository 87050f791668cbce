"""ZeRO-3's optimizer state on NVMe: what DeepSpeed's swapper needs from us.

The swapper keeps flat buffers of masters and moments in files, and brings one at a time into
memory. Two things differ from state in memory:

- *Gradients.* ``safe_set_local_grad`` writes a table's into a scratch buffer that all swapped
  buffers share; here it goes to the swapper, as autograd's gradients do, and stays in memory.
- *Checkpoints.* DeepSpeed copies its swap files, which only the same layout can read. Here every
  flat buffer is a state of its own with a file of its own (:class:`NvmeBuffer`), in blocks like any
  other: such a checkpoint loads anywhere, and at most one buffer is in memory while it is saved.

"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from ultramem_ds.sharding.blocks import Piece
from ultramem_ds.zero.deepspeed_import import deepspeed
from ultramem_ds.zero.state import Zero3State
from ultramem_ds.zero.tables import Zero3Tables


def keep_gradients_in_memory(swapper: Any) -> None:
    """Make DeepSpeed's swapper refer to gradients where they are, instead of writing them to files.

    They lie in buffers that exist anyway. From their files the swapper reads them back to where
    they belong in the flat buffer; where that is no multiple of a disk block (after a parameter of
    a few elements, say) other numbers arrive there in DeepSpeed 0.19.8, and no error.
    """

    def refer(parameter: Any, gradient_offsets: list[int], gradient_tensors: list[Tensor]) -> None:
        info = swapper.swap_params_info[swapper.parameter_id(parameter)]
        info.unswapped_gradients.update(zip(gradient_offsets, gradient_tensors))

    swapper.swap_out_gradients = refer


class NvmeTables(Zero3Tables):
    """The value tables of a model whose optimizer state is on NVMe."""

    def keep_partitioned(self, engine: Any) -> None:
        """As for any table; from here on gradients have somewhere to go."""
        super().keep_partitioned(engine)
        self._zero = engine.optimizer

    def publish_gradients(self) -> None:
        """See :class:`Zero3Tables`; the swapper refers to the gradients until the step is over."""
        zero = self._zero
        for param, shard in zip(self.params, self.shards):
            grad = shard.reduced_gradient().div_(self.world_size).flatten()
            shard.release_gradient()
            param_id = zero.get_param_id(param)
            buffer, offset, _ = zero.grad_position[param_id]
            if zero._swappable_optimizer_subgroup(buffer):
                zero.norm_for_param_grads[param_id] = zero._constant_buffered_norm2(grad)
                master = zero.fp32_partitioned_groups_flat[buffer]
                zero.optimizer_swapper.swap_out_gradients(master, [offset], [grad])
            else:
                deepspeed.utils.safe_set_local_grad(param, grad)


class NvmeState:
    """What DeepSpeed's own checkpoint file holds under NVMe: nothing. An ``OptimizerState``.

    Args:
        zero: the engine's state; its buffers become :attr:`buffers`.
        engine: the engine; its checkpoints leave the swap files alone from here on.
    """

    num_buffers = 0

    def __init__(self, zero: Zero3State, engine: Any) -> None:
        self._zero = zero
        pieces = zero.pieces()
        self.buffers = {
            f"nvme{index}": NvmeBuffer(
                zero, index, [replace(p, buffer=0) for p in pieces if p.buffer == index]
            )
            for index in range(zero.num_buffers)
        }
        engine.zero_nvme_offload_optimizer = lambda: False
        keep_gradients_in_memory(engine.optimizer.optimizer_swapper)

    def pieces(self) -> list[Piece]:
        """None."""
        return []

    @contextlib.contextmanager
    def open_buffer(self, index: int) -> Iterator[dict[str, Tensor]]:
        """There are none to open."""
        raise IndexError(index)
        yield {}

    def set_step(self, step: int) -> None:
        """Nothing: every buffer has been told."""

    def publish(self) -> None:
        """See ``OptimizerState``."""
        self._zero.publish()


class NvmeBuffer:
    """One flat buffer of masters and moments: an ``OwnState``.

    Args:
        zero: the engine's state.
        index: which of its flat buffers.
        pieces: what lies in it, numbered as of a state with this buffer alone.
    """

    num_buffers = 1

    def __init__(self, zero: Zero3State, index: int, pieces: list[Piece]) -> None:
        self._zero = zero
        self._index = index
        self._pieces = pieces

    def pieces(self) -> list[Piece]:
        """See ``OptimizerState``."""
        return self._pieces

    def open_buffer(self, index: int) -> contextlib.AbstractContextManager[dict[str, Tensor]]:
        """See ``OptimizerState``: read from NVMe before, written back after."""
        assert index == 0
        return self._zero.open_buffer(self._index)

    def set_step(self, step: int) -> None:
        """See ``OptimizerState``."""
        self._zero.set_buffer_step(self._index, step)

    def publish(self) -> None:
        """Nothing: the model's copies followed when the buffer was closed."""

    def saved(self) -> dict[str, Any]:
        """What a checkpoint holds of this buffer, read from NVMe."""
        step = self._zero.buffer_step(self._index)
        with self.open_buffer(0) as flats:
            own = {kind: [flat.clone()] for kind, flat in flats.items()}
        self.set_step(step)
        return {"flats": own, "step": step}
