"""Value tables under a row-sparse optimizer: frozen in ZeRO's eyes, stepped here.

Phases of an optimizer step, and who holds what:

1. *Lookup.* :class:`RowSparseShard` brings the distinct rows asked for up to date, copies them into
   a table of their own, and lets the scheme's kernels read and accumulate there. Nothing of the
   shard's size is touched. After its backward the rows' gradients join the step's sum.
2. *Publish.* The sums of other copies of the table are added by row; the squared norm joins
   ZeRO's, so that logged norm and clipping are the whole model's.
3. *Finish.* Once ZeRO has stepped the rest, the rows are stepped with the same clipping factor.

Checkpoints hold one file per rank beside DeepSpeed's, in blocks like any other state, so that they
load at other world sizes and schemes.

Letters: R rows on this rank, V value width, U distinct rows of one lookup or step, P ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ultramem_ds.checkpoint.state import MASTER, OwnState
from ultramem_ds.optim.decision import Decision
from ultramem_ds.optim.row_adam import LazyRowAdam
from ultramem_ds.sharding.blocks import Piece
from ultramem_ds.sharding.comm import Comm
from ultramem_ds.sharding.row_sum import RowSum
from ultramem_ds.sharding.shard import OpenShard, TableShard
from ultramem_ds.sharding.table_plan import ShardLayout, TableSpec
from ultramem_ds.zero.tables import Zero3Tables


class RowSparseShard(TableShard):
    """A shard whose gradient is kept by row: see the module's first phase.

    What a micro-batch's backward has left is added to the step's sum as soon as no lookup is
    between its forward and its backward: however many micro-batches a step has, their gradients
    take no more than the shard does.

    Args:
        spec, layout, read, replicas: as of :class:`TableShard`.
        adam: steps the rows.
    """

    def __init__(
        self,
        spec: TableSpec,
        layout: ShardLayout,
        read: Callable[[], Tensor],
        replicas: Comm,
        adam: LazyRowAdam,
    ) -> None:
        super().__init__(spec, layout, read, replicas)
        self.adam = adam
        self.gradients = RowSum(*layout.shape, adam.exp_avg_RV.device)
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._in_flight = 0

    def open(self, rows: Tensor) -> OpenShard:
        """The rows asked for as a table of their own; gradients add up in one as small."""
        rows_U, local_rows = torch.unique(rows, return_inverse=True)
        if not torch.is_grad_enabled():
            return OpenShard(self.adam.read(rows_U), local_rows, None)
        self.adam.refresh(rows_U)
        values_UV = self.values().index_select(0, rows_U)
        grad_UV = torch.zeros_like(values_UV, dtype=torch.float32)
        self._pending.append((rows_U, grad_UV))
        self._in_flight += 1
        return OpenShard(values_UV, local_rows, grad_UV)

    def close(self) -> None:
        """See :class:`TableShard`."""
        self._in_flight -= 1
        if self._in_flight == 0:
            self._merge()

    def _merge(self) -> None:
        for rows_U, grad_UV in self._pending:
            self.gradients.add(rows_U, grad_UV)
        self._pending.clear()

    def take_gradient(self) -> tuple[Tensor, Tensor]:
        """Distinct ascending rows and their gradients, summed over lookups and copies.

        A collective among the copies; once per optimizer step. Empties what was accumulated.
        """
        self._merge()  # what a forward without a backward left: zeros
        self._in_flight = 0
        rows_U, grad_UV = self.gradients.take()
        if self.replicas.world_size == 1:
            return rows_U, grad_UV
        counts_P = self.replicas.all_gather(rows_U.new_tensor([rows_U.numel()]), "counts").view(-1)
        counts = counts_P.tolist()
        if len(counts) * max(counts) > self.layout.num_rows:
            return self._reduce_whole(rows_U, grad_UV)
        padding = max(counts) - rows_U.numel()
        rows_PU = self.replicas.all_gather(_pad(rows_U, padding), "gradients")
        grad_PUV = self.replicas.all_gather(_pad(grad_UV, padding), "gradients")
        for copy_rows_U, copy_grad_UV, count in zip(rows_PU, grad_PUV, counts):
            self.gradients.add(copy_rows_U[:count], copy_grad_UV[:count])
        return self.gradients.take()

    def _reduce_whole(self, rows_U: Tensor, grad_UV: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the copies where all their rows together are more than the shard."""
        grad_RV = grad_UV.new_zeros(self.layout.shape).index_copy_(0, rows_U, grad_UV)
        touched_R = rows_U.new_zeros(self.layout.num_rows, dtype=torch.int32)
        touched_R[rows_U] = 1
        self.replicas.all_reduce_(grad_RV)
        rows_U = self.replicas.all_reduce_(touched_R).nonzero().view(-1)
        return rows_U, grad_RV.index_select(0, rows_U)


def _pad(x_U: Tensor, count: int) -> Tensor:
    return torch.cat([x_U, x_U.new_zeros((count, *x_U.shape[1:]))])


class RowSparseTables(Zero3Tables):
    """The value tables of one model on this rank, stepped by row: an ``OptimizerState`` too.

    Args:
        params: the tables' parameters, shards installed.
        shards: in the same order.
        names: of the parameters, in the same order.
        comm: all ranks.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        shards: Sequence[RowSparseShard],
        names: Sequence[str],
        comm: Comm,
    ) -> None:
        super().__init__(params, shards, comm.world_size)
        self.row_shards = list(shards)
        self.names = list(names)
        self.comm = comm
        self._gradients: list[tuple[Tensor, Tensor]] = []
        self._norm = torch.zeros(())
        for param in self.params:
            param.requires_grad_(False)

    def _lend_gradients(self, zero: Any) -> None:
        """ZeRO has no gradient of a frozen parameter."""

    def joined_norm(self) -> Tensor:
        """Global norm of the rows' gradients, as published."""
        return self._norm

    def publish_gradients(self) -> None:
        """Collect the rows' gradients and their norm; before ``engine.step``."""
        self._gradients = [shard.take_gradient() for shard in self.row_shards]
        squares = [grad_UV.square().sum(dtype=torch.float64) for _, grad_UV in self._gradients]
        # Every copy of a table counts it once: the sum over all ranks is that of all copies.
        copies = self.row_shards[0].replicas.world_size
        total = self.comm.all_reduce_(torch.stack(squares).sum())
        self._norm = (total / copies).sqrt().float() / self.world_size

    def finish_step(self, lr: float, decision: Decision) -> None:
        """Step the rows if ZeRO stepped the rest, clipped alike."""
        gradients, self._gradients = self._gradients, []
        if not decision.apply:
            for shard, (rows_U, _) in zip(self.row_shards, gradients):
                shard.adam.refresh(rows_U)  # in every copy, as where they were looked up
            return
        scale = decision.grad_scale / self.world_size
        for shard, (rows_U, grad_UV) in zip(self.row_shards, gradients):
            shard.adam.update(rows_U, grad_UV, lr, scale)

    def signal_and_power(self) -> Tensor:
        """See :class:`Zero3Tables`: of the rows of all shards."""
        return torch.stack([shard.adam.signal_and_power() for shard in self.row_shards]).sum(0)

    def own_states(self) -> dict[str, OwnState]:
        """Masters and moments of the rows: this object."""
        return {"tables": self}

    @property
    def num_buffers(self) -> int:
        """One per table."""
        return len(self.row_shards)

    def pieces(self) -> list[Piece]:
        """Whole shards, padding rows left out."""
        blocks = [shard.layout.block(shard.spec) for shard in self.row_shards]
        return [
            Piece(name, index, 0, block)
            for index, (name, block) in enumerate(zip(self.names, blocks))
            if block.numel
        ]

    @contextlib.contextmanager
    def open_buffer(self, index: int) -> Iterator[dict[str, Tensor]]:
        """Masters and moments of one table, in place."""
        adam = self.row_shards[index].adam
        yield {
            MASTER: adam.master_RV.view(-1),
            "exp_avg": adam.exp_avg_RV.view(-1),
            "exp_avg_sq": adam.exp_avg_sq_RV.view(-1),
        }

    def set_step(self, step: int) -> None:
        """Every row has seen ``step`` updates."""
        for shard in self.row_shards:
            shard.adam.set_step(step)

    def publish(self) -> None:
        """Nothing: ``set_step`` has copied the masters."""

    def saved(self) -> dict[str, Any]:
        """What a checkpoint holds of this rank's tables, live, all rows up to date."""
        flats: dict[str, list[Tensor]] = {}
        for index, shard in enumerate(self.row_shards):
            shard.adam.settle()
            with self.open_buffer(index) as buffers:
                for kind, flat in buffers.items():
                    flats.setdefault(kind, []).append(flat)
        return {"flats": flats, "step": self.row_shards[0].adam.step}
