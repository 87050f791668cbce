"""The memory layer: UltraMem and PKM are settings of one layer (paper section 3, Figures 3-5).

    x at block a -> Retrieval -> shuffle -> (row, projector) -> lookup ... wait -> projection -> out

``start`` runs at block a and begins the lookup; ``finish`` runs after block b and waits for it, so
that the blocks between can compute while rows travel. Neither is ``forward``: under ZeRO-3 a
module's direct parameters are gathered around its forward, and the table must never be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ultramem_ds.config.schema import MemoryConfig, ModelConfig
from ultramem_ds.kernels import resolve
from ultramem_ds.model.memory.expansion import build_shuffle
from ultramem_ds.model.memory.lookup import LocalLookup, Lookup, PendingLookup, ValueTable
from ultramem_ds.model.memory.retrieval import Retrieval, Selection
from ultramem_ds.model.memory.stats import NO_STATS, Observer
from ultramem_ds.model.roles import tag

# B sequences, S sequence length, T = B*S tokens, D hidden, E expansion, V value width.


class Sought(NamedTuple):
    """What a memory layer finds its rows by."""

    x_BSD: Tensor  # hidden states
    doc_boundaries_BS: Tensor | None
    conv_state: Tensor | None
    recall_tokens: int  # on how many the search is diagnosed


class Located(NamedTuple):
    """What a memory layer looks up for each token, and with which weights."""

    selection: Selection
    permuted_TK: Tensor  # slots after the shuffle, int64
    rows_TK: Tensor  # physical rows, int64
    projectors_TK: Tensor  # int64


# May move the convolution's state on in place.
Locate: TypeAlias = Callable[[Sought], Located]


@dataclass(frozen=True)
class PendingMemory:
    """A memory layer between ``start`` and ``finish``."""

    lookup: PendingLookup
    selection: Selection
    permuted_TK: Tensor  # slots after the shuffle, int64
    rows_TK: Tensor  # physical rows, int64
    shape: torch.Size  # (B, S, D)

    @property
    def aux_loss(self) -> Tensor:
        """Eq. 12 before alpha: 0-dim, graph attached; 0 for r = 1 and outside training."""
        return self.selection.aux_loss

    @property
    def conv_state(self) -> Tensor | None:
        """Pass to the next ``start`` when decoding: (B, kernel - 1, D), or None."""
        return self.selection.conv_state


def _value_projection(model: ModelConfig, memory: MemoryConfig) -> nn.Linear:
    """The E projectors V -> D of eq. 15 side by side: one linear map on the concatenation."""
    linear = nn.Linear(memory.expansion * memory.value_dim, model.hidden_size, bias=False)
    tag(linear.weight, role="matrix", init="memory_value_proj")
    return linear


class MemoryLayer(nn.Module):
    """One memory layer with its table.

    Args:
        model: Hidden size, dropout, norm epsilon.
        memory: Everything else.
        table: Holds the values: the whole table, or a stand-in that sharding fills with its rows.
    """

    def __init__(self, model: ModelConfig, memory: MemoryConfig, table: ValueTable) -> None:
        super().__init__()
        self.num_rows = memory.num_rows
        self.kernel = memory.kernel
        self.retrieval = Retrieval(model, memory, table.index)
        self.shuffle = build_shuffle(memory, table.index)
        self.values = table
        self.lookup: Lookup = LocalLookup(self.values, memory.expansion, memory.kernel)
        self.value_proj = _value_projection(model, memory) if memory.value_proj else nn.Identity()
        self.dropout = nn.Dropout(model.dropout)
        self.locate: Locate = self.retrieve_and_split  # infer/ may put a faster one here
        self.observer: Observer = NO_STATS  # of training forwards; see ``stats.StatsWindow``

    def mark_stale(self) -> None:
        """Call after every optimizer step and load: derived state (u, v) is then recomputed."""
        self.retrieval.mark_stale()

    def start(
        self,
        x_BSD: Tensor,
        doc_boundaries_BS: Tensor | None = None,
        conv_state: Tensor | None = None,
    ) -> PendingMemory:
        """Retrieve and begin the lookup.

        Args:
            x_BSD: Input of block a's MLP, after its pre-norm.
            doc_boundaries_BS: True at the first token of each document, or None for one document.
            conv_state: For decoding, ``PendingMemory.conv_state`` of the tokens before these.

        Returns:
            What ``finish`` needs; also carries ``aux_loss`` and the new ``conv_state``.
        """
        recall_tokens = self._observer().recall_tokens
        located = self.locate(Sought(x_BSD, doc_boundaries_BS, conv_state, recall_tokens))
        selection, permuted_TK, rows_TK, projectors_TK = located
        lookup = self.lookup.start(rows_TK, projectors_TK, selection.scores_TKh)
        return PendingMemory(lookup, selection, permuted_TK, rows_TK, x_BSD.shape)

    def retrieve_and_split(self, sought: Sought) -> Located:
        """See ``Locate``; leaves the state that it is given as it is."""
        selection: Selection = self.retrieval(*sought)
        permuted_TK = self.shuffle(selection.slots_TK)
        kernel = resolve(self.kernel, permuted_TK.device)
        return Located(selection, permuted_TK, *kernel.split(permuted_TK, self.num_rows))

    def finish(self, pending: PendingMemory, residual_BSD: Tensor | None = None) -> Tensor:
        """Wait and project: the (B, S, D) output to add to the residual stream, after dropout.

        Args:
            pending: What ``start`` returned.
            residual_BSD: The stream it will be added to; only statistics look at it.
        """
        pooled_TX = pending.lookup.wait().flatten(1)
        output_BSD = self.value_proj(pooled_TX).view(pending.shape)
        self._observer().observe(
            pending.selection, pending.rows_TK, pending.permuted_TK, output_BSD, residual_BSD
        )
        return self.dropout(output_BSD)

    def _observer(self) -> Observer:
        return self.observer if self.training else NO_STATS
