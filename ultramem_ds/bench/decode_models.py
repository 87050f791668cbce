"""The models of ``bench decode``: real shapes, shared memory, routing under control.

All models of a run take their weights from one buffer, each from its beginning: what the weights
are is irrelevant to their speed, and four models of 8 GB then need 8 GB. Embedding and head are
left out (a vocabulary of 256), so that a forward is the blocks, the memory layers and the norm.

Letters: B sequences, D hidden, K rows per token, X experts, k experts per token, C cached
positions, A attention heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from ultramem_ds.config.schema import Config, ModelConfig
from ultramem_ds.infer.experts import GroupedExperts, Router
from ultramem_ds.infer.prepare import prepare_for_decoding
from ultramem_ds.infer.weights import GroupedWeights
from ultramem_ds.kernels import resolve
from ultramem_ds.kernels.cpu import PANEL
from ultramem_ds.kernels.hugepages import advise_huge_pages
from ultramem_ds.model.init import init_parameter
from ultramem_ds.model.lm import LanguageModel, StepInputs
from ultramem_ds.model.memory.layer import Locate, Located, Sought
from ultramem_ds.model.transformer import Attention, AttentionContext, Block, KVSlot

Routing: TypeAlias = Literal["forced-uniform", "iid-uniform", "own"]
KVMode: TypeAlias = Literal["none", "eighth", "full"]

KV_LENGTH = 2048  # cached positions (paper, Figures 1, 6c and 7)
_KV_BYTES = 512 << 20  # distinct key/value buffers of a model, at least: far beyond a cache
_REAL = 1 << 16  # parameters up to this size are initialised: norms, cores, convolutions
_MOST_DRAWS = 16  # routings prepared in advance, so that a step does not find the last one's rows
_DRAWN_TOKENS = 1 << 16  # but of so many tokens at most: those of a large batch leave no cache warm
_ALIGNMENT = 1024  # elements: tensors begin on a page


def bench_config(config: Config) -> Config:
    """``config`` without dropout and with next to no vocabulary."""
    return replace(config, model=replace(config.model, vocab_size=256, dropout=0.0))


class WeightBuffer:
    """Memory that every model lays its weights over, filled once with seeded numbers."""

    def __init__(self, num_elements: int, dtype: torch.dtype, device: str, seed: int) -> None:
        self.elements = torch.empty(num_elements, dtype=dtype, device=device)
        advise_huge_pages(self.elements)
        generator = torch.Generator(device).manual_seed(seed)
        pattern = torch.empty(min(num_elements, 1 << 24), dtype=dtype, device=device)
        pattern.uniform_(-0.03, 0.03, generator=generator)
        for piece in self.elements.split(pattern.numel()):
            piece.copy_(pattern[: piece.numel()])
        self._used = 0

    def restart(self) -> None:
        """Give out memory from the beginning again: for the next model."""
        self._used = 0

    def take(self, shape: Sequence[int]) -> Tensor:
        """The next piece of the buffer."""
        count = torch.Size(shape).numel()
        begin = self._used
        self._used += -(-count // _ALIGNMENT) * _ALIGNMENT
        assert self._used <= self.elements.numel()
        return self.elements[begin : begin + count].view(*shape)


def elements_needed(config: Config) -> int:
    """Elements that :func:`build_on` takes for ``config`` at most, panels filled up."""
    with torch.device("meta"):
        model = LanguageModel(bench_config(config))
    return sum(_padded(param) for param in model.parameters())


def _padded(param: nn.Parameter) -> int:
    outputs = param.shape[0] if param.ndim == 2 else 1
    return param.numel() // outputs * (outputs + PANEL) + _ALIGNMENT


def build_on(buffer: WeightBuffer, config: Config) -> LanguageModel:
    """Build a prepared model whose large weights lie in ``buffer``."""
    config = bench_config(config)
    with torch.device("meta"):
        model = LanguageModel(config)
        for block in model.blocks:
            cast(Block, block).attention = GroupedQueryAttention(config.model)
    buffer.restart()
    for memory in model.memory_layers:
        form = memory.retrieval.form
        memory.retrieval.form = type(form)(config.memory)  # its buffers must be real
        for name, param in form.named_parameters():  # and its parameters wait for their values
            setattr(memory.retrieval.form, name, param)

    kernel = resolve("auto", buffer.elements.device)

    def packer(linears: Sequence[nn.Linear]) -> GroupedWeights:
        shape = kernel.packed_shape(*linears[0].weight.shape, dtype=buffer.elements.dtype)
        return GroupedWeights(buffer.take((len(linears), *shape)), linears[0].out_features)

    prepare_for_decoding(model, packer, like=buffer.elements)
    _materialise(model, buffer)
    model.to(buffer.elements.device).mark_stale()
    return model


def _materialise(model: LanguageModel, buffer: WeightBuffer) -> None:
    """Give every parameter that has no memory its own: small ones as trained, others shared."""
    for module_name, module in model.named_modules():
        for name, param in list(module.named_parameters(recurse=False)):
            real = nn.Parameter(torch.empty(param.shape), requires_grad=False)
            if param.numel() <= _REAL and (param.is_meta or not param.is_contiguous()):
                real.__dict__.update(param.__dict__)
                init_parameter(f"{module_name}.{name}", real, model.config, seed=0)
                real.data = real.data.to(buffer.elements)
            elif param.is_meta:
                real = nn.Parameter(buffer.take(param.shape), requires_grad=False)
            else:
                continue
            setattr(module, name, real)


class ForcedRouter:
    """A gate whose result is replaced after it has been computed.

    Args:
        gate: the experts' own router; its cost and its weights stay.
        draws_NTk: experts of N steps in turn.
    """

    def __init__(self, gate: Router, draws_NTk: Tensor) -> None:
        self.gate = gate
        self.draws = cycle(draws_NTk)

    def __call__(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Own weights, forced experts, own balance loss."""
        weights_Tk, _, balance_loss = self.gate(x_TD)
        return weights_Tk, next(self.draws), balance_loss


class ForcedLocate:
    """A memory layer's ``locate`` whose rows are replaced after they have been found.

    Args:
        locate: the layer's own; its cost stays.
        draws_NTK: slots after the permutation, of N steps in turn.
        num_rows: of the table.
    """

    def __init__(self, locate: Locate, draws_NTK: Tensor, num_rows: int) -> None:
        self.locate = locate
        rows_NTK, projectors_NTK = draws_NTK % num_rows, draws_NTK // num_rows
        self.draws = cycle(list(zip(draws_NTK, rows_NTK, projectors_NTK)))

    def __call__(self, sought: Sought) -> Located:
        """Own scores, forced rows."""
        own = self.locate(sought)
        return Located(own.selection, *next(self.draws))


def balanced_experts(
    num_draws: int, num_tokens: int, top_k: int, num_experts: int, generator: torch.Generator
) -> Tensor:
    """Experts ``(N, T, k)``, fully balanced: ``min(T k, X)`` distinct ones (paper section 4).

    Random permutations of all experts are dealt in turn; where a token's choices straddle two of
    them and one expert is in both, the second is drawn again.
    """
    draws = []
    for _ in range(num_draws):
        dealt: list[int] = []
        while len(dealt) < num_tokens * top_k:
            deal = torch.randperm(num_experts, generator=generator).tolist()
            begun = len(dealt) % top_k
            if begun == 0 or not set(dealt[-begun:]) & set(deal[: top_k - begun]):
                dealt += deal
        draws.append(torch.tensor(dealt[: num_tokens * top_k]).view(num_tokens, top_k))
    return torch.stack(draws)


def num_draws(batch: int) -> int:
    """How many routings are prepared for steps of ``batch`` tokens."""
    return max(2, min(_MOST_DRAWS, _DRAWN_TOKENS // batch))


def kv_bytes(config: ModelConfig, batch: int, mode: KVMode, element_size: int) -> int:
    """Keys and values that a step reads, all blocks."""
    size = 2 * batch * _cached_heads(config, mode) * KV_LENGTH * config.head_dim * element_size
    return config.num_layers * size


def _cached_heads(config: ModelConfig, mode: KVMode) -> int:
    if mode == "none":
        return 0
    return config.num_heads if mode == "full" else max(1, config.num_heads // 8)


def force_routing(model: LanguageModel, routing: Routing, num_tokens: int, seed: int) -> None:
    """Replace what is selected in every layer; the cost of selecting stays.

    ``forced-uniform``: experts fully balanced, slots uniform. ``iid-uniform``: every token draws
    its experts for itself, so that some are idle. ``own``: as the weights have it.
    """
    generator = torch.Generator().manual_seed(seed)
    device = model.embedding.weight.device
    for block in model.blocks:
        experts = block.mlp
        if isinstance(experts, GroupedExperts):
            gate = experts.route.gate if isinstance(experts.route, ForcedRouter) else experts.route
            sizes = (num_draws(num_tokens), num_tokens, experts.top_k, experts.num_experts)
            if routing == "own":
                experts.route = gate
                continue
            if routing == "forced-uniform":
                draws = balanced_experts(*sizes, generator)
            else:
                scores = torch.rand(sizes[0], num_tokens, sizes[3], generator=generator)
                draws = scores.topk(experts.top_k, dim=-1).indices
            experts.route = ForcedRouter(gate, draws.to(device))
    memory_config = model.config.memory
    for memory in model.memory_layers:
        own = memory.locate.locate if isinstance(memory.locate, ForcedLocate) else memory.locate
        shape = (num_draws(num_tokens), num_tokens, memory_config.rows_per_token)
        draws = torch.randint(memory_config.num_slots, shape, generator=generator).to(device)
        forced = ForcedLocate(own, draws, memory.num_rows)
        memory.locate = own if routing == "own" else forced


class OnlyNew:
    """A key/value slot that remembers nothing: attention over the token itself."""

    def update(self, keys_BASK: Tensor, values_BASK: Tensor) -> tuple[Tensor, Tensor]:
        """The new keys and values, laid out alike as a cache has them."""
        keys, values = torch.stack((keys_BASK, values_BASK)).unbind(0)
        return keys, values


class FullBuffer:
    """A full cache whose last position is written again at every step.

    ``A`` may be a fraction of the queries' heads: the first heads' keys are stored then, and each
    serves a group of queries (Ainslie et al., 2023).
    """

    def __init__(self, keys_BACK: Tensor, values_BACK: Tensor) -> None:
        self.keys_BACK = keys_BACK
        self.values_BACK = values_BACK

    def update(self, keys_BASK: Tensor, values_BASK: Tensor) -> tuple[Tensor, Tensor]:
        """Write the newest position; return all."""
        num_heads = self.keys_BACK.shape[1]
        self.keys_BACK[:, :, -1:] = keys_BASK[:, :num_heads]
        self.values_BACK[:, :, -1:] = values_BASK[:, :num_heads]
        return self.keys_BACK, self.values_BACK


class GroupedQueryAttention(Attention):
    """Attention of one new token where cached heads may serve several query heads."""

    def forward(self, x_BSD: Tensor, context: AttentionContext, kv: KVSlot | None = None) -> Tensor:
        """Attend to the whole cache; ``(B, 1, D)``."""
        assert kv is not None and x_BSD.shape[1] == 1
        q_BA1K, k_BA1K, v_BA1K = self.project(x_BSD, context)
        k_BACK, v_BACK = kv.update(k_BA1K, v_BA1K)
        kernel = resolve("auto", q_BA1K.device)
        out_BA1K = kernel.attend(q_BA1K, k_BACK, v_BACK, None, 0.0)
        return self.out_proj(out_BA1K.reshape(x_BSD.shape))


class KVPool:
    """The key/value slots of all blocks; every model of a run uses the same.

    Large layers share their buffers in turn: beyond ``_KV_BYTES`` nothing is left in a cache.

    Attributes:
        num_bytes: read per step, all blocks.
        slots: one per block.
    """

    def __init__(self, config: ModelConfig, batch: int, mode: KVMode, like: Tensor) -> None:
        self.num_bytes = kv_bytes(config, batch, mode, like.element_size())
        self.slots: list[KVSlot] = [OnlyNew() for _ in range(config.num_layers)]
        if mode != "none":
            shape = (2, batch, _cached_heads(config, mode), KV_LENGTH, config.head_dim)
            layer_bytes = torch.Size(shape).numel() * like.element_size()
            count = min(config.num_layers, -(-_KV_BYTES // layer_bytes))
            pool = torch.zeros(count, *shape, dtype=like.dtype, device=like.device)
            buffers = [FullBuffer(keys, values) for keys, values in pool.unbind(0)]
            self.slots = [buffers[i % count] for i in range(config.num_layers)]


class BenchState:
    """A :class:`ultramem_ds.model.lm.DecodeState` that stays at position ``KV_LENGTH - 1``."""

    def __init__(self, model: LanguageModel, batch: int, pool: KVPool) -> None:
        like = model.embedding.weight
        self.kv = pool.slots
        self.conv: list[Tensor | None] = [None] * len(model.memories)
        reach = model.config.memory.query_conv - 1
        if reach > 0:
            width = model.config.model.hidden_size
            self.conv = [like.new_zeros(batch, reach, width) for _ in self.conv]
        self.position_11 = torch.full((1, 1), KV_LENGTH - 1, device=like.device)

    def enter(self, num_new: int) -> StepInputs:
        """One further token, which sees everything."""
        assert num_new == 1
        return StepInputs(self.position_11, None, None)

    def keep_conv(self, index: int, inputs_BSD: Tensor, state_BCD: Tensor | None) -> None:
        """See ``DecodeState``; the address stays, for graphs."""
        address = self.conv[index]
        if address is not None and state_BCD is not None and state_BCD is not address:
            address.copy_(state_BCD)


def count_touched(
    model: LanguageModel, step: Callable[[], object], num_steps: int
) -> tuple[float, float]:
    """Distinct experts and rows per layer that ``step`` reads, mean over layers and steps."""
    experts: list[int] = []
    rows: list[int] = []
    handles = []
    for block in model.blocks:
        if isinstance(block.mlp, GroupedExperts):
            handles.append(
                block.mlp.register_forward_hook(
                    lambda module, inputs, out: experts.append(int((out.expert_counts > 0).sum()))
                )
            )
    located = [(memory, memory.locate) for memory in model.memory_layers]
    for memory, locate in located:
        memory.locate = partial(_locate_counting, locate, rows)
    for _ in range(num_steps):
        step()
    for handle in handles:
        handle.remove()
    for memory, locate in located:
        memory.locate = locate
    return sum(experts) / max(1, len(experts)), sum(rows) / max(1, len(rows))


def _locate_counting(locate: Locate, counts: list[int], sought: Sought) -> Located:
    """``locate``, with its distinct rows counted."""
    found = locate(sought)
    counts.append(found.rows_TK.unique().numel())
    return found
