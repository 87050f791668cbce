"""The one file that calls collectives; every byte that leaves a rank is counted here.

``scripts/check_collectives.py`` (part of ``make lint``) proves the first half of that sentence.

Known traps of gloo in torch 2.13, met by construction here: ``all_gather`` wants equal sizes,
``reduce_scatter`` is an all-reduce inside (an all-to-all and a local sum is 2-3 times faster),
and once ``_coalescing_manager`` has been entered collectives silently do nothing.

Letters: P ranks of the group, M entries on the move.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

Category: TypeAlias = Literal["counts", "ids", "scores", "rows", "pooled", "gradients"]
Direction: TypeAlias = Literal["forward", "backward"]


# What gloo, its sockets and NCCL say when the process at the other end is gone.
_LOST = ("closed by peer", "reset by peer", "Broken pipe", "remote process", "Connection refused")


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone, not by this rank's fault."""
    if not isinstance(error, RuntimeError | ConnectionError):
        return False
    return isinstance(error, dist.DistError) or any(part in str(error) for part in _LOST)


def split_ranks(
    shard_group_size: int = 0, group: dist.ProcessGroup | None = None
) -> tuple[Comm, Comm]:
    """Cuts a group into contiguous sub-groups that each share one copy of the tables.

    With 4 ranks and size 2, ranks (0, 1) and (2, 3) share a copy each; (0, 2) and (1, 3) hold the
    same block and add their gradients. The process groups are new, so that lookups running beside
    the model never mix with its own collectives. All ranks of ``group`` call this together.

    Args:
        shard_group_size: ranks per copy; 0 = all.
        group: the data-parallel group; None is the world.

    Returns:
        The ranks that share this rank's copy, and the ranks that hold the same block.

    Raises:
        ValueError: the size does not divide the number of ranks.
    """
    ranks = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
    size = shard_group_size or len(ranks)
    if len(ranks) % size:
        raise ValueError(
            f"memory.shard_group_size={size} must divide the {len(ranks)} data-parallel ranks"
        )
    copy, place = divmod(ranks.index(dist.get_rank()), size)
    # Each rank makes its own two groups only: with many copies, most groups are not its business.
    shard = dist.new_group(ranks[copy * size :][:size], use_local_synchronization=True)
    replicas = dist.new_group(ranks[place::size], use_local_synchronization=True)
    return Comm(shard), Comm(replicas)


class Comm:
    """Collectives of one process group, differentiable where gradients must travel back.

    All ranks of the group call the same methods in the same order, from one thread at a time.

    Attributes:
        group: the process group; None is the world.
        rank: this process's place in the group.
        world_size: P.
        bytes_sent: bytes this rank sent to *others*, by (category, direction); the part of a
            collective that a rank sends to itself does not count.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.bytes_sent: Counter[tuple[Category, Direction]] = Counter()

    def global_rank(self, rank: int) -> int:
        """The world's number of this group's ``rank``."""
        group = self.group if self.group is not None else dist.group.WORLD
        assert group is not None
        return dist.get_global_rank(group, rank)

    def exchange_counts(self, counts_PX: Tensor) -> Tensor:
        """Row p of ``counts_PX`` (P, X) int64 goes to rank p; row p of the result is from p."""
        received_PX = torch.empty_like(counts_PX)
        dist.all_to_all_single(received_PX, counts_PX.contiguous(), group=self.group)
        others = counts_PX.numel() // self.world_size * (self.world_size - 1)
        self.bytes_sent["counts", "forward"] += others * counts_PX.element_size()
        return received_PX

    def all_to_all(
        self, x: Tensor, send: Sequence[int], recv: Sequence[int], category: Category
    ) -> Tensor:
        """Sends ``send[p]`` leading entries of ``x`` to each rank p, in rank order.

        Args:
            x: (sum(send), ...), any dtype.
            send: P numbers of entries.
            recv: P numbers of entries that come from each rank.
            category: what the bytes are counted as.

        Returns:
            (sum(recv), ...), in rank order; differentiable in ``x``.
        """
        received: Tensor = _AllToAll.apply(x, self, list(send), list(recv), category)
        return received

    def all_gather(self, x: Tensor, category: Category) -> Tensor:
        """(M, ...) of the same shape on every rank -> (P, M, ...); differentiable in ``x``."""
        gathered: Tensor = _AllGather.apply(x, self, category)
        return gathered

    def all_reduce_(self, x: Tensor) -> Tensor:
        """Sums ``x`` over the group, in place (ring: 2 (P-1)/P of its bytes leave each rank)."""
        if self.world_size > 1:
            dist.all_reduce(x, group=self.group)
        size = x.numel() * x.element_size()
        self.bytes_sent["gradients", "backward"] += (
            2 * size * (self.world_size - 1) // (self.world_size)
        )
        return x

    def all_reduce_max_(self, x: Tensor) -> Tensor:
        """Largest value over the group, in place; for numbers, not payloads (uncounted)."""
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)
        return x

    def barrier(self) -> None:
        """Waits until every rank of the group is here."""
        dist.barrier(group=self.group)

    def all_agree(self, mine: bool) -> bool:
        """Whether ``mine`` is true on every rank of the group."""
        disagree = torch.tensor(float(not mine), device=self._device)
        return not self.all_reduce_max_(disagree).item()

    @contextlib.contextmanager
    def raising_together(self, kind: type[Exception]) -> Iterator[None]:
        """If some rank raises ``kind`` inside, every rank of the group raises it at the end.

        No collective may run inside: the ranks that fail would miss it. The message is that of the
        first rank that failed, with its number.
        """
        message: str | None = None
        try:
            yield
        except kind as error:
            message = str(error)
        if self.all_agree(message is None):
            return
        messages = self.gather_objects(message)
        rank, first = next((r, m) for r, m in enumerate(messages) if m is not None)
        raise kind(first if rank == self.rank else f"{first} (found by rank {rank})")

    def gather_objects(self, mine: Any) -> list[Any]:
        """What every rank of the group hands in, by rank; for reports, not for payloads."""
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, mine, group=self.group)
        return gathered

    def from_first(self, mine: Any) -> Any:
        """What the group's first rank hands in; small objects."""
        holder = [mine]
        dist.broadcast_object_list(holder, self.global_rank(0), self.group, self._device)
        return holder[0]

    def numbers_from_first(self, mine: Sequence[float]) -> list[float]:
        """What the group's first rank hands in, fp64; as many on every rank."""
        if self.world_size == 1:
            return [float(number) for number in mine]
        numbers = torch.tensor(mine, dtype=torch.float64, device=self._device)
        dist.broadcast(numbers, self.global_rank(0), group=self.group)
        found: list[float] = numbers.tolist()
        return found

    @property
    def _device(self) -> torch.device:
        """Where the backend of the group takes tensors."""
        backend = dist.get_backend(self.group)
        return torch.device("cuda" if backend == "nccl" else "cpu")

    def transfer(
        self,
        x: Tensor,
        send: list[int],
        recv: list[int],
        category: Category,
        direction: Direction,
    ) -> Tensor:
        """The all-to-all itself, outside autograd."""
        received = x.new_empty((sum(recv), *x.shape[1:]))
        dist.all_to_all_single(received, x.contiguous(), recv, send, group=self.group)
        entry_bytes = x[:1].numel() * x.element_size() if x.shape[0] else 0
        others = sum(send) - send[self.rank]
        self.bytes_sent[category, direction] += others * entry_bytes
        return received


class _AllToAll(torch.autograd.Function):
    """Gradients of what was received go back to who sent it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, comm: Comm, send: list[int], recv: list[int], category: Category
    ) -> Tensor:
        ctx.comm, ctx.send, ctx.recv, ctx.category = comm, send, recv, category
        return comm.transfer(x, send, recv, category, "forward")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        back = ctx.comm.transfer(grad, ctx.recv, ctx.send, ctx.category, "backward")
        return back, None, None, None, None


class _AllGather(torch.autograd.Function):
    """Gradients go home by an all-to-all, where they are added in rank order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm, category: Category) -> Tensor:
        ctx.comm, ctx.category = comm, category
        gathered = x.new_empty((comm.world_size, *x.shape))
        dist.all_gather(list(gathered.unbind()), x.contiguous(), group=comm.group)
        others = comm.world_size - 1
        comm.bytes_sent[category, "forward"] += others * x.numel() * x.element_size()
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        splits = [1] * ctx.comm.world_size
        partial = ctx.comm.transfer(grad, splits, splits, ctx.category, "backward")
        return partial.sum(0), None, None  # half precision is added in fp32 inside
