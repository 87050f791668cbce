"""The lookup that a memory layer of a sharded model is handed, over any scheme and executor.

Letters: T tokens, K rows per token, h cores, E expansion, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ultramem_ds.config.schema import MemoryConfig
from ultramem_ds.sharding.dimensionwise import DimensionWise
from ultramem_ds.sharding.execution import Executor, Job
from ultramem_ds.sharding.groups import TableGroups
from ultramem_ds.sharding.numberwise import NumberWise
from ultramem_ds.sharding.pooled import OwnerPooled
from ultramem_ds.sharding.scheme import Local, Scheme
from ultramem_ds.sharding.shard import TableShard

SCHEMES: dict[str, type[Scheme[Any]]] = {
    "number-wise": NumberWise,
    "dimension-wise": DimensionWise,
    "owner-pooled": OwnerPooled,
}


class ShardedLookup:
    """Starts a lookup at block a and takes its result at block b (paper App. C).

    The chain of a scheme's three roles is one job for the executor; it has an autograd graph of
    its own. The model's graph sees a pair of functions: *start* takes the scores and gives a
    ticket, *wait* takes the ticket and gives the pooled values. In the backward pass *wait*
    submits the reversed chain and *start* waits for it and hands out the scores' gradient, so
    both directions run beside the blocks between a and b. Synchronous execution is the same
    code over an executor that runs jobs at once, hence the same numbers to the last bit.

    Every forward and every backward is a sequence of collectives: all ranks of the group make
    the same calls in the same order, also a rank without tokens.

    Args:
        scheme: how the table is shared.
        executor: where the chain runs; one per process group.
    """

    def __init__(self, scheme: Scheme[Any], executor: Executor) -> None:
        self.scheme = scheme
        self.executor = executor

    def start(self, rows_TK: Tensor, projectors_TK: Tensor, scores_TKh: Tensor) -> PendingPooled:
        """Begins a lookup.

        Args:
            rows_TK: (T, K) int64 physical rows, 0 <= row < N.
            projectors_TK: (T, K) int64, 0 <= projector < E.
            scores_TKh: (T, K, h) floating, differentiable.

        Returns:
            What gives pooled_TEV, (T, E, V) in the table's dtype, when waited for.

        Raises:
            RowRangeError: on every rank, here or at ``wait``, if a rank's rows are out of range.
        """
        flight = _Flight(self.scheme, self.executor, rows_TK, projectors_TK, scores_TKh)
        # The anchor keeps backward's collectives in the graph when the scores need no gradient.
        anchor = torch.empty(0, requires_grad=torch.is_grad_enabled())
        ticket: Tensor = _Start.apply(scores_TKh, anchor, flight)
        return PendingPooled(ticket, flight)


class PendingPooled:
    """A lookup under way."""

    def __init__(self, ticket: Tensor, flight: _Flight) -> None:
        self._ticket = ticket
        self._flight = flight

    def wait(self) -> Tensor:
        """pooled_TEV, once only; its backward starts the way back."""
        pooled_TEV: Tensor = _Wait.apply(self._ticket, self._flight)
        return pooled_TEV


class _Flight:
    """One lookup's journey out and back: the jobs, and between them the chain's own graph."""

    def __init__(
        self,
        scheme: Scheme[Any],
        executor: Executor,
        rows_TK: Tensor,
        projectors_TK: Tensor,
        scores_TKh: Tensor,
    ) -> None:
        training = torch.is_grad_enabled()
        leaf_TKh = scores_TKh.detach().requires_grad_(training)

        def chain() -> Tensor:
            with torch.set_grad_enabled(training):
                return scheme.run(rows_TK.detach(), projectors_TK.detach(), leaf_TKh)

        self._executor = executor
        self._shard = scheme.shard
        self._leaf_TKh = leaf_TKh
        self._forward: Job = executor.submit(chain)
        self._backward: Job | None = None

    def land(self) -> Tensor:
        """The forward job's result, outside its graph."""
        return self._forward.result().detach()

    def turn_back(self, grad_TEV: Tensor) -> None:
        """Submits the chain's backward."""
        pooled_TEV, leaf_TKh = self._forward.result(), self._leaf_TKh

        def chain_backward() -> Tensor:
            with torch.enable_grad():  # off inside a backward, where an inline job runs
                seed: Tensor = _Seed.apply(pooled_TEV, grad_TEV)
            seed.backward()
            self._shard.close()
            assert leaf_TKh.grad is not None
            return leaf_TKh.grad

        self._backward = self._executor.submit(chain_backward)

    def come_home(self) -> Tensor:
        """Waits for the chain's backward; the scores' gradient."""
        assert self._backward is not None, "start's backward runs after wait's"
        return self._backward.result()


class _Seed(torch.autograd.Function):
    """Pooled values -> a scalar whose backward begins with ``grad_TEV``.

    ``pooled_TEV.backward(grad_TEV)`` is the same, but loads SymPy to compare two shapes: 25 MB and
    a second in every process.
    """

    @staticmethod
    def forward(ctx: Any, pooled_TEV: Tensor, grad_TEV: Tensor) -> Tensor:
        ctx.grad_TEV = grad_TEV
        return torch.zeros((), device=pooled_TEV.device)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.grad_TEV, None


class _Start(torch.autograd.Function):
    """Scores -> ticket; in the backward, waits for the scores' gradient."""

    @staticmethod
    def forward(ctx: Any, scores_TKh: Tensor, anchor: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        return torch.zeros((), device=scores_TKh.device)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None, None]:
        return ctx.flight.come_home(), None, None


class _Wait(torch.autograd.Function):
    """Ticket -> pooled values; in the backward, starts the way back."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        return flight.land()

    @staticmethod
    def backward(ctx: Any, grad_TEV: Tensor) -> tuple[Tensor, None]:
        ctx.flight.turn_back(grad_TEV)
        return torch.zeros((), device=grad_TEV.device), None


def build_lookup(
    shard: TableShard, scheme: str, groups: TableGroups, memory: MemoryConfig
) -> ShardedLookup:
    """The lookup over this rank's shard of one table.

    Args:
        shard: this rank's block, laid out by ``shard_layout`` for the same scheme and group.
        scheme: a resolved ``memory.partition`` (not auto).
        groups: who shares this copy of the table, and where lookups run.
        memory: wire dtype, de-duplication, kernel.
    """
    make_scheme = Local if groups.shard.world_size == 1 else SCHEMES[scheme]
    return ShardedLookup(make_scheme(shard, groups.shard, memory), groups.executor)
