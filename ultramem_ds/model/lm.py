"""The decoder-only language model of every kind; it reads like a single-process model.

Letters: B sequences, S tokens per sequence, D hidden, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypedDict, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultramem_ds.config.schema import Architecture
from ultramem_ds.model.memory.layer import MemoryLayer, PendingMemory
from ultramem_ds.model.memory.lookup import ValueTable
from ultramem_ds.model.moe import MixtureOfExperts
from ultramem_ds.model.placement import Placement
from ultramem_ds.model.roles import tag
from ultramem_ds.model.transformer import (
    AttentionContext,
    Block,
    BlockOutput,
    DenseMLP,
    KVSlot,
    make_linear,
    make_norm,
    rotary_tables,
)

_NO_TARGET = -100  # no token has this id


class StepInputs(NamedTuple):
    """What a forward over S further positions of a decoding batch is given."""

    positions_BS: Tensor  # rotary positions, (1 or B, S)
    mask_BSS: Tensor | None  # see AttentionContext
    doc_boundaries_BS: Tensor | None  # True at a sequence's first token; None: nothing starts here


class DecodeState(Protocol):
    """What decoding carries from call to call (``infer/cache.py``)."""

    conv: list[Tensor | None]  # one per memory layer: its last kernel - 1 inputs

    @property
    def kv(self) -> Sequence[KVSlot]:
        """One per block."""
        ...

    def enter(self, num_new: int) -> StepInputs:
        """Begin a forward over ``num_new`` further positions."""
        ...

    def keep_conv(self, index: int, inputs_BSD: Tensor, state_BCD: Tensor | None) -> None:
        """Take what memory layer ``index``'s convolution needs of this forward.

        Args:
            index: of ``conv``.
            inputs_BSD: the convolution's inputs of this forward.
            state_BCD: its last kernel - 1 inputs, those before this forward included; None
                without a convolution. A step of one token may have written it over ``conv[index]``.
        """
        ...


class Scored(NamedTuple):
    """A forward of :class:`LanguageModel` that gives logits instead of losses."""

    state: DecodeState  # what came before, and where this forward is kept
    picks_M: Tensor  # positions whose logits are wanted, int64 indices into the flat (B * S,)


class LossTerms(TypedDict):
    """What one training forward returns; all 0-dim fp32 tensors but ``expert_counts``."""

    loss: Tensor  # next-token cross-entropy, nats, mean over targets
    aux_loss: Tensor  # eq. 12, weighted, summed over memory layers
    balance_loss: Tensor  # MoE load balance, weighted, summed over blocks
    expert_counts: Tensor  # (blocks with experts, experts), int64; (0, 0) without experts


class LanguageModel(nn.Module):
    """Embedding, blocks with memory layers beside them, final norm, head.

    Args:
        config: what the model is; nothing of how it is trained.
        make_mlp: builds block i's MLP; the default is the one-process MLP of ``config.model.kind``.
        make_table: builds memory layer i's value table; the default is the whole table.

    Attributes:
        run_block: calls a block on its inputs (:mod:`ultramem_ds.model.recompute`).
    """

    def __init__(
        self,
        config: Architecture,
        make_mlp: Callable[[int], nn.Module] | None = None,
        make_table: Callable[[int], ValueTable] | None = None,
    ) -> None:
        super().__init__()
        model, memory = config.model, config.memory
        self.config = config
        self.run_block: Callable[..., BlockOutput] = _run
        make_mlp = make_mlp or (lambda _: local_mlp(config))
        make_table = make_table or (
            lambda i: ValueTable(memory.num_rows, memory.value_dim, table_index=i)
        )
        self.embedding = nn.Embedding(model.vocab_size, model.hidden_size)
        tag(self.embedding.weight, role="embedding", init="embedding")
        self.dropout = nn.Dropout(model.dropout)
        self.blocks = nn.ModuleList(Block(model, make_mlp(i)) for i in range(model.num_layers))
        spans = memory.spans if config.has_memory else ()
        self.memories = nn.ModuleList(
            MemoryLayer(model, memory, make_table(i)) for i in range(len(spans))
        )
        self.placement = Placement.from_spans(spans, model.num_layers)
        self.final_norm = make_norm(model.norm, model.hidden_size, model.norm_eps)
        self.head = make_linear(model.hidden_size, model.vocab_size)

    def hidden(
        self,
        tokens_BS: Tensor,
        doc_ids_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
        state: DecodeState | None = None,
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        """Run embedding, blocks and memory layers.

        Args:
            tokens_BS: token ids, int64.
            doc_ids_BS: number of each position's document, int64, runs of equal numbers: attention
                and the memory's query convolution stay inside it; None ignores documents.
            positions_BS: rotary positions; None counts from the start of the sequence.
            state: carries decoding from call to call; it gives documents and positions itself.

        Returns:
            The normalised hidden states ``(B, S, D)``, then the blocks' balance losses and expert
            counts and the memory layers' auxiliary losses, all unweighted.
        """
        model = self.config.model
        S = tokens_BS.shape[1]
        mask_BSS = doc_boundaries_BS = None
        if state is not None:
            positions_BS, mask_BSS, doc_boundaries_BS = state.enter(S)
        if positions_BS is None:
            positions_BS = torch.arange(S, device=tokens_BS.device).unsqueeze(0)
        if doc_ids_BS is not None:
            index_S = torch.arange(S, device=tokens_BS.device)
            doc_boundaries_BS = F.pad(doc_ids_BS.diff(dim=1) != 0, (1, 0), value=True)
            same_BSS = doc_ids_BS.unsqueeze(2) == doc_ids_BS.unsqueeze(1)
            mask_BSS = (same_BSS & (index_S <= index_S.unsqueeze(1))).unsqueeze(1)
        x_BSD = self.dropout(self.embedding(tokens_BS))
        cos_BSK, sin_BSK = rotary_tables(
            positions_BS, model.head_dim, model.rope_theta, x_BSD.dtype
        )
        context = AttentionContext(cos_BSK, sin_BSK, mask_BSS)
        memories = self.memory_layers
        pending: dict[int, PendingMemory] = {}
        balance, counts, aux = [], [], []
        for i, block in enumerate(self.blocks):
            kv = None if state is None else state.kv[i]
            out = self.run_block(block, x_BSD, context, kv)
            x_BSD = out.x_BSD
            if out.balance_loss is not None and out.expert_counts is not None:
                balance.append(out.balance_loss)
                counts.append(out.expert_counts)
            for j in self.placement.starts[i]:
                conv = None if state is None else state.conv[j]
                pending[j] = memories[j].start(out.mlp_input_BSD, doc_boundaries_BS, conv)
                if state is not None:
                    state.keep_conv(j, out.mlp_input_BSD, pending[j].conv_state)
                aux.append(pending[j].aux_loss)
            for j in self.placement.finishes[i]:
                x_BSD = x_BSD + memories[j].finish(pending.pop(j), x_BSD)
        return self.final_norm(x_BSD), balance, counts, aux

    def logits(self, tokens_BS: Tensor, state: DecodeState | None = None) -> Tensor:
        """Logits of every position, ``(B, S, W)``; padded vocabulary entries are not masked."""
        return self.head(self.hidden(tokens_BS, state=state)[0])

    @overload
    def forward(
        self,
        tokens_BS1: Tensor,
        doc_ids_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
        loss_mask_BS: Tensor | None = None,
        vocab_limit: int | None = None,
    ) -> LossTerms: ...

    @overload
    def forward(self, tokens_BS1: Tensor, *, scored: Scored) -> Tensor: ...

    def forward(
        self,
        tokens_BS1: Tensor,
        doc_ids_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
        loss_mask_BS: Tensor | None = None,
        vocab_limit: int | None = None,
        scored: Scored | None = None,
    ) -> LossTerms | Tensor:
        """Next-token losses of ``(B, S + 1)`` token ids; see :meth:`hidden` for the rest.

        The loss is the mean over the targets, with ``loss_mask_BS`` (bool) over those it marks,
        and 0 if it marks none.

        ``vocab_limit`` masks the logits of the vocabulary's padding (evaluation); training leaves
        them in. With ``scored`` the ids are ``(B, S)`` further tokens and the result is the logits
        ``(M, W)`` of the picked positions, padding not masked: one call of the module, so that it
        works under ZeRO-3 as well.
        """
        if scored is not None:
            x_BSD = self.hidden(tokens_BS1, state=scored.state)[0]
            logits_MW: Tensor = self.head(x_BSD.flatten(0, 1)[scored.picks_M])
            return logits_MW
        inputs_BS, targets_BS = tokens_BS1[:, :-1], tokens_BS1[:, 1:]
        x_BSD, balance, counts, aux = self.hidden(inputs_BS, doc_ids_BS, positions_BS)
        logits_BSW = self.head(x_BSD)
        scores_TW, targets_T = logits_BSW[..., :vocab_limit].flatten(0, 1), targets_BS.reshape(-1)
        if loss_mask_BS is None:
            loss = F.cross_entropy(scores_TW.float(), targets_T)
        else:
            targets_T = targets_T.masked_fill(~loss_mask_BS.flatten(), _NO_TARGET)
            total = F.cross_entropy(
                scores_TW.float(), targets_T, ignore_index=_NO_TARGET, reduction="sum"
            )
            loss = total / loss_mask_BS.sum().clamp_min(1)
        zero = loss.new_zeros(())
        config = self.config
        return LossTerms(
            loss=loss,
            aux_loss=config.memory.aux_loss_weight * torch.stack(aux).sum() if aux else zero,
            balance_loss=(
                config.moe.balance_loss_weight * torch.stack(balance).sum() if balance else zero
            ),
            expert_counts=(
                torch.stack(counts) if counts else zero.new_zeros((0, 0), dtype=torch.int64)
            ),
        )

    @property
    def memory_layers(self) -> tuple[MemoryLayer, ...]:
        """The memory layers in order of placement."""
        return tuple(cast(MemoryLayer, memory) for memory in self.memories)

    def mark_stale(self) -> None:
        """Tell memory layers that weights changed; call after every optimizer step and load."""
        for memory in self.memory_layers:
            memory.mark_stale()


def _run(block: nn.Module, *inputs: Any) -> BlockOutput:
    out: BlockOutput = block(*inputs)
    return out


def local_mlp(config: Architecture) -> nn.Module:
    """The one-process MLP of a block."""
    if config.model.kind == "moe":
        return MixtureOfExperts(config.model, config.moe)
    return DenseMLP(config.model.hidden_size, config.model.inner_size)
