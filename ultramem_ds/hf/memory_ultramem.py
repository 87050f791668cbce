"""The memory layer in plain torch operations: traceable, on any device (docs/export.md).

The same layer as ``ultramem_ds.model.memory``, whose arithmetic it takes over (search, forms,
losses); what differs is what transformers and ``torch.compile`` want: buffers that survive
construction on the meta device, a convolution state that lives in the cache, and a table that may
stay on another device than the rest.

Letters: B sequences, S new positions, T = B*S tokens, D hidden, H heads, r Tucker rank, h cores,
n keys per side, m top-m, K = H*m rows per token, E expansion, N rows, V value width, d kdim, k
convolution taps. A leading 2 is the side: rows, then columns.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ultramem_ds.hf.configuration_ultramem import UltraMemConfig
from ultramem_ds.kernels.pairs import best_pairs, top_candidates
from ultramem_ds.model.init import gaussian_top_mean
from ultramem_ds.model.memory.expansion import round_tables, shuffle_seed
from ultramem_ds.model.memory.keys import Fingerprint
from ultramem_ds.model.memory.query import LAYOUTS
from ultramem_ds.model.memory.scores import ScoreForm, leading_singular_vectors, tucker_aux_loss


def make_norm(norm_type: str, width: int, eps: float) -> nn.Module:
    """A weight-only norm over the last dimension, or none."""
    if norm_type == "none":
        return nn.Identity()
    if norm_type == "layernorm":
        return nn.LayerNorm(width, eps=eps, bias=False)
    return nn.RMSNorm(width, eps=eps)


def residual_std(config: UltraMemConfig) -> float:
    """Initial standard deviation of matrices that write to the residual stream."""
    return config.initializer_range / (2 * config.num_hidden_layers) ** 0.5


class UltraMemConv(nn.Module):
    """Causal depthwise convolution, whose last k - 1 inputs are a state of the cache.

    Args:
        config: shapes.
        layer_idx: block whose cache holds the state.
        state_idx: number of the state among those of that block.
    """

    def __init__(self, config: UltraMemConfig, layer_idx: int, state_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.state_idx = state_idx
        self.reach = config.memory_query_conv - 1
        self.weight = nn.Parameter(torch.empty(config.memory_query_conv, config.hidden_size))

    def forward(
        self, x_BSD: Tensor, doc_boundaries_BS: Tensor | None, past_key_values: Cache | None
    ) -> Tensor:
        """Convolve; padding must be zeros already.

        Args:
            x_BSD: inputs.
            doc_boundaries_BS: True at the first token of a packed document; taps do not cross it.
            past_key_values: holds the inputs before these, gets these.
        """
        seq_len = x_BSD.shape[1]
        context_BDC = x_BSD.transpose(1, 2)
        if past_key_values is not None and self.reach:
            context_BDC = past_key_values.update_conv_state(
                context_BDC, self.layer_idx, self.state_idx, conv_kernel_size=self.reach
            )
        # Zeros before the first token; whatever else the cache keeps is cut off.
        missing = seq_len + self.reach - context_BDC.shape[-1]
        context_BCD = F.pad(context_BDC, (missing, 0)).transpose(1, 2)
        out_BSD = x_BSD * self.weight[self.reach]
        document = None
        if doc_boundaries_BS is not None:
            document = F.pad(doc_boundaries_BS.cumsum(1), (self.reach, 0))
        for tap in range(self.reach):
            past_BSD = context_BCD[:, tap : tap + seq_len]
            if document is not None:
                same_BS = document[:, tap : tap + seq_len] == document[:, self.reach :]
                past_BSD = past_BSD * same_BS[..., None]
            out_BSD = out_BSD + past_BSD * self.weight[tap]
        return out_BSD


class UltraMemQuery(nn.Module):
    """Hidden states to normalised queries, one per (token, ``LAYOUTS`` dimension)."""

    def __init__(self, config: UltraMemConfig, layer_idx: int, state_idx: int) -> None:
        super().__init__()
        sizes = {"s": 2, "h": config.memory_num_heads, "r": config.memory_tucker_rank}
        self.group_sizes = tuple(sizes[letter] for letter in LAYOUTS[config.memory_query])
        self.kdim = config.memory_kdim
        self.conv = UltraMemConv(config, layer_idx, state_idx) if config.memory_query_conv else None
        self.proj = nn.Linear(
            config.hidden_size, math.prod(self.group_sizes) * config.memory_kdim, bias=False
        )
        self.norm = make_norm(config.memory_qk_norm, config.memory_kdim, config.norm_eps)
        if config.memory_retrieval == "tdqkr":  # makes the mean selected score 1 (Appendix A)
            num_slots = config.memory_expansion * config.memory_num_rows
            gain = gaussian_top_mean(num_slots, config.memory_top_m) ** -0.5
            if isinstance(self.norm, nn.Identity):
                self.proj.init_std = gain / config.hidden_size**0.5
            else:
                self.norm.init_value = gain

    def forward(
        self, x_BSD: Tensor, doc_boundaries_BS: Tensor | None, past_key_values: Cache | None
    ) -> Tensor:
        """Queries (T, 2, d), (T, H, 2, d) or (T, H, r, d) by layout."""
        if self.conv is not None:
            x_BSD = self.conv(x_BSD, doc_boundaries_BS, past_key_values)
        return self.norm(self.proj(x_BSD).view(-1, *self.group_sizes, self.kdim))


class UltraMemKeys(nn.Module):
    """Row and column keys (2, H, n, r, d), normalised over d; kept where nothing changes them."""

    def __init__(self, config: UltraMemConfig) -> None:
        super().__init__()
        heads, rank, width = (
            config.memory_num_heads,
            config.memory_tucker_rank,
            config.memory_kdim,
        )
        self.weight = nn.Parameter(torch.empty(2, heads, config.memory_num_keys, rank, width))
        self.norm = make_norm(config.memory_qk_norm, width, config.norm_eps)
        self.norm.init_value = width**-0.5
        self._kept: tuple[list[Fingerprint], Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles keep no derived keys."""
        return {**self.__dict__, "_kept": None}

    def forward(self) -> Tensor:
        """Keys in fp32 at least."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._normalised()
        sources = [self.weight, *self.norm.parameters()]
        kept = self._kept
        if kept is None or not all(print_.matches(s) for print_, s in zip(kept[0], sources)):
            kept = ([Fingerprint(source) for source in sources], self._normalised())
            self._kept = kept
        return kept[1]

    def _normalised(self) -> Tensor:
        keys_2Hnrd = self.norm(self.weight)
        return keys_2Hnrd.to(torch.promote_types(keys_2Hnrd.dtype, torch.float32))


class UltraMemCore(nn.Module):
    """The h cores per head and the leading singular vectors (u, v) of their sum.

    The vectors follow the cores while training, and whenever the module is put into evaluation
    mode (which ``from_pretrained`` does) or saved. Their joint sign continues the one before.
    """

    directions: Tensor

    def __init__(self, config: UltraMemConfig) -> None:
        super().__init__()
        heads, rank = config.memory_num_heads, config.memory_tucker_rank
        self.core_shape = (config.memory_num_cores, heads, rank, rank)
        self.core = nn.Parameter(torch.empty(self.core_shape))
        self.register_buffer("directions", torch.zeros(2, heads, rank, dtype=torch.float32))
        self.margin = config.memory_aux_loss_margin
        self.register_state_dict_pre_hook(lambda module, *_: module.refresh())

    @torch.no_grad()
    def refresh(self) -> None:
        """Recompute u and v, unless the cores are not here (meta, or partitioned)."""
        if self.core.is_meta or tuple(self.core.shape) != self.core_shape:
            return
        total_Hrr = self._cores().sum(0)
        fresh = leading_singular_vectors(
            total_Hrr.double().cpu(), self.directions.double().cpu()
        ).to(self.directions)
        self.directions.copy_(fresh)

    def train(self, mode: bool = True) -> UltraMemCore:
        """Set the mode; evaluation begins with vectors of the present cores."""
        if self.training and not mode:
            self.refresh()
        super().train(mode)
        return self

    def _cores(self) -> Tensor:
        return self.core.to(torch.promote_types(self.core.dtype, torch.float32))

    def forward(self) -> ScoreForm:
        """Bind the present cores."""
        core_hHrr = self._cores()
        aux_loss: Tensor | float = 0.0
        if self.training:
            self.refresh()
            aux_loss = tucker_aux_loss(torch.linalg.svdvals(core_hHrr.sum(0)), self.margin)
        return ScoreForm(core_hHrr, self.directions.to(core_hHrr.dtype), aux_loss=aux_loss)


class UltraMemRetrieval(nn.Module):
    """The best m slots of each head and their scores per core."""

    def __init__(self, config: UltraMemConfig, layer_idx: int, state_idx: int) -> None:
        super().__init__()
        self.query = UltraMemQuery(config, layer_idx, state_idx)
        self.form = UltraMemCore(config) if config.memory_retrieval == "tdqkr" else None
        self.keys = UltraMemKeys(config)
        self.product = f"t{LAYOUTS[config.memory_query]}d,shnrd->sthnr"
        self.num_keys = config.memory_num_keys
        self.num_heads = config.memory_num_heads
        self.top_m = config.memory_top_m
        self.candidates: Any = config.memory_candidates
        self.softmax = config.memory_softmax

    def forward(
        self, x_BSD: Tensor, doc_boundaries_BS: Tensor | None, past_key_values: Cache | None
    ) -> tuple[Tensor, Tensor, Tensor | float]:
        """Slots (T, K) int64, scores (T, K, h) in fp32 at least, and eq. 12 before alpha."""
        queries = self.query(x_BSD, doc_boundaries_BS, past_key_values)
        keys_2Hnrd = self.keys()
        if self.form is not None:
            form: ScoreForm = self.form()
        else:
            form = ScoreForm(None, keys_2Hnrd.new_ones(2, self.num_heads, 1))
        scores_2THnr = torch.einsum(self.product, queries.to(keys_2Hnrd.dtype), keys_2Hnrd)
        with torch.no_grad():
            ranked_2THn = (scores_2THnr * form.directions_2Hr[:, None, :, None, :]).sum(-1)
            candidates_2THc = top_candidates(ranked_2THn, self.top_m, self.candidates)
        index = candidates_2THc[..., None].expand(*candidates_2THc.shape, scores_2THnr.shape[-1])
        picks_2THm, scores_THmh = best_pairs(
            form.core_hHrr, scores_2THnr.gather(-2, index), self.top_m
        )
        rows_THm, cols_THm = candidates_2THc.gather(-1, picks_2THm).unbind(0)
        if self.softmax:
            scores_THmh = scores_THmh.softmax(dim=-2)
        slots_THm = rows_THm * self.num_keys + cols_THm
        return slots_THm.flatten(1), scores_THmh.flatten(1, 2), form.aux_loss


class BijectionShuffle(nn.Module):
    """A permutation of [0, n*n): a Feistel network whose round functions are stored."""

    rounds: Tensor

    def __init__(self, config: UltraMemConfig, table_index: int) -> None:
        super().__init__()
        self.num_keys = config.memory_num_keys
        self.seed = shuffle_seed(table_index)
        self.register_buffer("rounds", torch.zeros(4, self.num_keys, dtype=torch.int64))

    def fresh(self) -> Tensor:
        """The round functions that a new model has."""
        return round_tables(self.num_keys, self.seed)

    def forward(self, slots: Tensor) -> Tensor:
        """Permuted slots."""
        left, right = slots // self.num_keys, slots % self.num_keys
        for table in self.rounds:
            left, right = right, (left + table[right]) % self.num_keys
        return left * self.num_keys + right


class StoredShuffle(nn.Module):
    """A permutation of [0, E*N) held as a table."""

    index: Tensor

    def __init__(self, config: UltraMemConfig, table_index: int) -> None:
        super().__init__()
        self.seed = shuffle_seed(table_index)
        num_slots = config.memory_expansion * config.memory_num_rows
        self.register_buffer("index", torch.zeros(num_slots, dtype=torch.int64))

    def fresh(self) -> Tensor:
        """The permutation that a new model has."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(len(self.index), generator=generator, device="cpu")

    def forward(self, slots: Tensor) -> Tensor:
        """Permuted slots."""
        return self.index[slots]


SHUFFLES = {"bijection": BijectionShuffle, "stored": StoredShuffle}


class UltraMemTable(nn.Module):
    """The values (N, V), on ``config.memory_device`` where one is named."""

    def __init__(self, config: UltraMemConfig) -> None:
        super().__init__()
        self.expansion = config.memory_expansion
        self.device = config.memory_device
        self.weight = nn.Parameter(torch.empty(config.memory_num_rows, config.memory_value_dim))

    def _apply(self, fn: Any, recurse: bool = True) -> UltraMemTable:
        """Follow changes of dtype, but not of device, if the table has its own."""
        if self.device is None or self.weight.is_meta:
            super()._apply(fn, recurse)
            return self
        dtype = fn(self.weight.new_empty(0)).dtype
        super()._apply(lambda tensor: tensor.to(self.device, dtype), recurse)
        return self

    def forward(self, rows_TK: Tensor, projectors_TK: Tensor, scores_TKh: Tensor) -> Tensor:
        """Weighted sums of rows per (token, projector), ``(T, E, V)``, where the ids are."""
        home = rows_TK.device
        table_NV = self.weight
        rows_TK, projectors_TK, scores_TKh = (
            each.to(table_NV.device) for each in (rows_TK, projectors_TK, scores_TKh)
        )
        order_TK = projectors_TK.argsort(dim=1, stable=True)
        rows_M = rows_TK.gather(1, order_TK).flatten()
        bags_E = torch.arange(self.expansion, device=rows_M.device)
        counts_TE = (projectors_TK[:, :, None] == bags_E).sum(1)
        ends_B = counts_TE.flatten().cumsum(0)
        starts_B = ends_B - counts_TE.flatten()
        num_cores = scores_TKh.shape[-1]
        chunks_NhV = table_NV.view(-1, table_NV.shape[1] // num_cores)
        pooled = [
            F.embedding_bag(
                rows_M * num_cores + core,
                chunks_NhV,
                starts_B,
                mode="sum",
                per_sample_weights=scores_TK.gather(1, order_TK).flatten().to(table_NV.dtype),
            )
            for core, scores_TK in enumerate(scores_TKh.unbind(-1))
        ]
        return torch.cat(pooled, dim=-1).view(len(rows_TK), self.expansion, -1).to(home)


class UltraMemMemory(nn.Module):
    """One memory layer.

    Args:
        config: everything.
        table_index: number of the layer.
        layer_idx: block that it starts at, from 0.
        state_idx: number of its convolution state among those of that block.
    """

    def __init__(
        self, config: UltraMemConfig, table_index: int, layer_idx: int, state_idx: int
    ) -> None:
        super().__init__()
        self.num_rows = config.memory_num_rows
        self.retrieval = UltraMemRetrieval(config, layer_idx, state_idx)
        shuffle = SHUFFLES.get(config.memory_shuffle)
        self.shuffle = shuffle(config, table_index) if shuffle else None
        self.values = UltraMemTable(config)
        self.value_proj = (
            nn.Linear(
                config.memory_expansion * config.memory_value_dim, config.hidden_size, bias=False
            )
            if config.memory_value_proj
            else None
        )
        if self.value_proj is not None:
            inputs = self.value_proj.in_features
            paper = config.memory_retrieval == "tdqkr"
            self.value_proj.init_std = inputs**-0.5 if paper else residual_std(config)  # type: ignore[assignment]
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x_BSD: Tensor,
        padding_mask_BS: Tensor | None = None,
        doc_boundaries_BS: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor, Tensor | float]:
        """The output (B, S, D) to add to the residual stream, and eq. 12 before alpha.

        Args:
            x_BSD: input of a block's MLP, after its norm.
            padding_mask_BS: zero where a position is padding.
            doc_boundaries_BS: True at the first token of a packed document.
            past_key_values: holds the convolution's state.
        """
        if padding_mask_BS is not None:
            x_BSD = x_BSD * padding_mask_BS[..., None].to(x_BSD.dtype)
        slots_TK, scores_TKh, aux_loss = self.retrieval(x_BSD, doc_boundaries_BS, past_key_values)
        if self.shuffle is not None:
            slots_TK = self.shuffle(slots_TK)
        pooled_TEV = self.values(slots_TK % self.num_rows, slots_TK // self.num_rows, scores_TKh)
        output = pooled_TEV.flatten(1).to(x_BSD.dtype)
        if self.value_proj is not None:
            output = self.value_proj(output)
        return self.dropout(output.view_as(x_BSD)), aux_loss
