"""The memory layers of the served model: the training model's own, with three parts exchanged.

Retrieval, shuffle and projection are ``model/memory``'s, whole on every rank. The convolution keeps
its state per request (``query_conv``); the table holds the rows of this rank; the lookup sums over
ranks.

Letters: T tokens, K rows per token, h cores, E projectors, N physical rows, R rows of this rank, V
value width, P tensor-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)

from ultramem_ds.config.schema import Config
from ultramem_ds.model.memory.layer import MemoryLayer
from ultramem_ds.model.memory.lookup import LocalLookup, PendingLookup, ValueTable
from ultramem_ds.vllm.query_conv import PagedCausalConv


class RowShardedTable(ValueTable):
    """The run of a table's rows that one rank holds; runs are equal, in order of rank.

    Of 10 rows, ranks 0 to 3 hold 0-2, 3-5, 6-8 and 9; the last run is filled up with zeros.

    Args:
        num_rows: N.
        value_dim: V.
        table_index: 0-based number of the memory layer.
        rank: this rank.
        num_ranks: P.
    """

    def __init__(
        self, num_rows: int, value_dim: int, table_index: int, rank: int, num_ranks: int
    ) -> None:
        held = -(-num_rows // num_ranks)
        super().__init__(held, value_dim, table_index)
        self.num_rows = num_rows
        self.first_row = rank * held
        self.weight.data[max(num_rows - self.first_row, 0) :] = 0

    def take(self, part_RV: Tensor, first_row: int) -> None:
        """Copy what this rank holds of the rows ``first_row ...`` of the table.

        Raises:
            ValueError: if they are not rows of this table.
        """
        if part_RV.shape[1] != self.weight.shape[1] or first_row + len(part_RV) > self.num_rows:
            raise ValueError(
                f"rows {first_row} to {first_row + len(part_RV)} of {part_RV.shape[1]} columns are "
                f"none of a table of {self.num_rows} rows of {self.weight.shape[1]}"
            )
        begin = max(self.first_row, first_row)
        end = min(self.first_row + len(self.weight), first_row + len(part_RV))
        if begin < end:
            self.weight.data[begin - self.first_row : end - self.first_row].copy_(
                part_RV[begin - first_row : end - first_row]
            )


@dataclass(frozen=True)
class SummedLookup:
    """This rank's share of a lookup; waiting adds the other ranks'."""

    local: PendingLookup

    def wait(self) -> Tensor:
        """The pooled values of all ranks' rows, ``(T, E, V)``."""
        pooled_TEV: Tensor = tensor_model_parallel_all_reduce(self.local.wait())
        return pooled_TEV


class RowShardedLookup:
    """Rows over tensor-parallel ranks: every rank pools the rows it holds, then all are summed.

    Every rank has the same ids and scores, as its hidden states are the same bits: no ids travel. A
    row held elsewhere is read as row 0 with weight 0.
    """

    def __init__(self, table: RowShardedTable, num_projectors: int) -> None:
        self.table = table
        self.local = LocalLookup(table, num_projectors, "auto")

    def start(self, rows_TK: Tensor, projectors_TK: Tensor, scores_TKh: Tensor) -> SummedLookup:
        """See ``model.memory.lookup.Lookup``."""
        local_TK = rows_TK - self.table.first_row
        held_TK = (local_TK >= 0) & (local_TK < len(self.table.weight))
        return SummedLookup(
            self.local.start(
                local_TK.where(held_TK, 0), projectors_TK, scores_TKh * held_TK.unsqueeze(-1)
            )
        )


def build_memory_layer(config: Config, index: int, prefix: str) -> MemoryLayer:
    """Memory layer ``index`` with this rank's rows; weights are loaded later.

    Args:
        config: of the exported model.
        index: j, counted from 0.
        prefix: of the model among vLLM's layers.
    """
    memory, num_ranks = config.memory, get_tensor_model_parallel_world_size()
    rank = get_tensor_model_parallel_rank()
    table = RowShardedTable(memory.num_rows, memory.value_dim, index, rank, num_ranks)
    layer = MemoryLayer(config.model, memory, table)
    if num_ranks > 1:
        layer.lookup = RowShardedLookup(table, memory.expansion)
    if memory.query_conv:
        # vLLM orders layers with a cache by the number in their name: those of blocks come first.
        name = f"{prefix}.query_convs.{config.model.num_layers + index}"
        layer.retrieval.query.conv = PagedCausalConv(
            config.model.hidden_size, memory.query_conv, name
        )
    return layer
