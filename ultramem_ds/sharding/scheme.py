"""What every partition scheme is: three named roles over a request of its own.

Letters: T tokens, K rows per token, h cores, E expansion, V value width, P ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.profiler import record_function

from ultramem_ds.config.schema import MemoryConfig
from ultramem_ds.kernels import lookup_reduce
from ultramem_ds.sharding.comm import Comm
from ultramem_ds.sharding.shard import TableShard
from ultramem_ds.sharding.table_plan import TableSpec

RequestT = TypeVar("RequestT")

WIRE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class RowRangeError(RuntimeError):
    """A rank looked up rows that the table does not have; raised on every rank of the group."""


class Scheme(ABC, Generic[RequestT]):
    """A sharded lookup as three roles, written forward only: autograd runs them in reverse.

    Everything that the way back needs from the way out is in the request, nothing on the scheme.
    All ranks of the group run the same roles in the same order, also those without tokens.

    Args:
        shard: this rank's block of the table.
        comm: the group that shares the table.
        memory: ``wire_dtype`` of rows, sums and scores that travel (added up in fp32; auto is the
            table's, since rows in bf16 gain nothing from travelling in fp32), ``kernel``.
    """

    def __init__(self, shard: TableShard, comm: Comm, memory: MemoryConfig) -> None:
        self.shard = shard
        self.comm = comm
        self.kernel = memory.kernel
        self.wire_dtype = WIRE_DTYPES.get(memory.wire_dtype, shard.values().dtype)

    def run(self, rows_TK: Tensor, projectors_TK: Tensor, scores_TKh: Tensor) -> Tensor:
        """pooled_TEV in the table's dtype: the three roles, one after the other."""
        with record_function("ultramem::input_dist"):
            request = self.input_dist(rows_TK, projectors_TK, scores_TKh)
        with record_function("ultramem::compute"):
            answer = self.compute(request)
        with record_function("ultramem::output_dist"):
            return self.output_dist(answer, request)

    @abstractmethod
    def input_dist(self, rows_TK: Tensor, projectors_TK: Tensor, scores_TKh: Tensor) -> RequestT:
        """Carries what the owners need to the owners."""

    @abstractmethod
    def compute(self, request: RequestT) -> Tensor:
        """Reads this rank's block only, no communication."""

    @abstractmethod
    def output_dist(self, answer: Tensor, request: RequestT) -> Tensor:
        """Carries the answers home; pooled_TEV."""


@dataclass(frozen=True)
class LocalRequest:
    """Rows, projectors and scores as selected."""

    rows_TK: Tensor
    projectors_TK: Tensor
    scores_TKh: Tensor


class Local(Scheme[LocalRequest]):
    """The whole table on this rank: nothing travels."""

    def input_dist(
        self, rows_TK: Tensor, projectors_TK: Tensor, scores_TKh: Tensor
    ) -> LocalRequest:
        """Checks the row ids; nothing travels.

        A CPU says which rank had bad ids; elsewhere the device stops, for the host does not ask.
        """
        spec, rank = self.shard.spec, self.comm.global_rank(0)
        num_bad = count_bad_rows(rows_TK, spec)
        if num_bad.device.type != "cpu":
            torch._assert_async(num_bad == 0, _range_message({rank: "some"}, spec))
        elif num_bad:
            raise RowRangeError(_range_message({rank: int(num_bad)}, spec))
        return LocalRequest(rows_TK, projectors_TK, scores_TKh)

    def compute(self, request: LocalRequest) -> Tensor:
        """Looks up, weights and pools, (T, E, V)."""
        opened = self.shard.open(request.rows_TK)
        return lookup_reduce(
            opened.values_RV,
            opened.rows,
            request.projectors_TK,
            request.scores_TKh,
            self.shard.spec.num_projectors,
            grad_values_RV=opened.grad_sink_RV,
            kernel=self.kernel,
        )

    def output_dist(self, answer: Tensor, request: LocalRequest) -> Tensor:
        """The answer is at home."""
        return answer


@dataclass(frozen=True)
class Splits:
    """Entries this rank sends to, and receives from, each rank of the group."""

    send: list[int]
    recv: list[int]


def count_bad_rows(rows_TK: Tensor, spec: TableSpec) -> Tensor:
    """How many row ids lie outside the table; 0-dim int64, no host sync."""
    return ((rows_TK < 0) | (rows_TK >= spec.num_rows)).sum()


def agree_on_splits(
    comm: Comm, counts: tuple[Tensor, ...], num_bad: Tensor, spec: TableSpec
) -> list[Splits]:
    """First phase of an exchange: everybody learns how much comes from whom.

    The one host sync of a lookup. Bad row ids travel with the counts, so that all ranks raise
    together instead of one raising and the others waiting for ever. Example on 2 ranks::

        rank 0: counts [3, 1]  ->  send [3, 1], recv [3, 2]
        rank 1: counts [2, 5]  ->  send [2, 5], recv [1, 5]
        then all_to_all moves 1 entry from rank 0 to 1 and 2 from rank 1 to 0.

    Args:
        comm: the group that shares the table.
        counts: (P,) int64 each, how many things of one kind go to each rank.
        num_bad: 0-dim int64, see ``count_bad_rows``.
        spec: the table, for the message.

    Returns:
        The splits of each kind, as Python integers.

    Raises:
        RowRangeError: some rank had bad rows; on every rank of the group, naming that rank.
    """
    sent_PX = torch.stack([*counts, num_bad.expand(comm.world_size)], dim=1)
    received_PX = comm.exchange_counts(sent_PX)
    (*sends, _), (*recvs, bad) = torch.stack([sent_PX, received_PX]).transpose(1, 2).tolist()
    offenders = {comm.global_rank(p): count for p, count in enumerate(bad) if count}
    if offenders:
        raise RowRangeError(_range_message(offenders, spec))
    return [Splits(send, recv) for send, recv in zip(sends, recvs)]


def _range_message(offenders: Mapping[int, int | str], spec: TableSpec) -> str:
    who = ", ".join(f"rank {rank}: {count} ids" for rank, count in offenders.items())
    return f"{spec.name}: row ids outside 0..{spec.num_rows - 1} were looked up ({who})"
