"""The launches of one decode step, counted where there is no device: on torch's meta device.

Every operator that a step gives to the device is noted with the bytes that it reads and writes and
its products; views and allocations launch nothing. A GPU runs at least one kernel per operator
(a top-m runs two), so the number is from below. Three things are noted as the GPU does them rather
than as torch's meta device would: a retrieval is two Triton programs and its query projection, the
lookup one, attention one fused kernel.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ultramem_ds.bench.decode_models import (
    BenchState,
    GroupedQueryAttention,
    KVMode,
    KVPool,
    bench_config,
)
from ultramem_ds.config.schema import Config
from ultramem_ds.infer.prepare import prepare_for_decoding
from ultramem_ds.kernels.finding import FoundRows, RowFinder
from ultramem_ds.kernels.reference import ReferenceKernel
from ultramem_ds.kernels.tiles import power_of_two
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.model.memory.scores import ScoreForm, TuckerCore

META = torch.device("meta")
# They hand out memory or a number, or look at what is there.
_NO_LAUNCH = {
    *("empty", "new_empty", "empty_like", "empty_strided"),
    *("_unsafe_view", "lift_fresh", "promote_types"),
}
# Read of their first operand what they return; write of it what they are given.
_GATHERS = {"index_select", "index", "gather", "embedding"}
_SCATTERS = {"index_copy_", "index_put_", "index_add_", "index_add", "scatter_add", "scatter_add_"}


@dataclass(frozen=True)
class Launch:
    """One operator given to the device.

    Attributes:
        name: torch's, or ours.
        num_bytes: read and written, each element once.
        num_flops: multiplications and additions of products; 0 for everything else.
    """

    name: str
    num_bytes: float
    num_flops: float = 0.0


class _Watch(TorchDispatchMode):
    def __init__(self, touched_experts: float) -> None:
        super().__init__()
        self.touched_experts = touched_experts
        self.launches: list[Launch] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        views = [r.alias_info for r in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in views)
        if not is_view and name not in _NO_LAUNCH:
            self.launches.append(self._launch(name, args, out))
        return out

    def _launch(self, name: str, args: tuple[Any, ...], out: Any) -> Launch:
        read, written = list(_tensors(args)), list(_tensors(out))
        result = sum(map(_num_bytes, written))
        if name in _GATHERS:
            return Launch(name, 2 * result + sum(map(_num_bytes, read[1:])))
        if name in _SCATTERS:
            return Launch(name, 3 * sum(map(_num_bytes, read[1:])))
        total = result + sum(map(_num_bytes, read))
        if name == "_grouped_mm":
            x_MK, packed_XKN = read[0], read[1]
            num_experts, _, width = packed_XKN.shape
            idle = 1 - min(1.0, self.touched_experts / num_experts)
            return Launch(name, total - idle * _num_bytes(packed_XKN), 2.0 * x_MK.numel() * width)
        if name in ("mm", "bmm"):
            return Launch(name, total, 2.0 * read[0].numel() * read[1].shape[-1])
        return Launch(name, total)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _num_bytes(tensor: Tensor) -> int:
    """Of the distinct elements: what is expanded is read once."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride()) if stride or size == 0]
    return torch.Size(sizes).numel() * tensor.element_size()


class _KnownDirections(nn.Module):
    """Cores whose singular vectors are known, as they are in every decode step but the first."""

    def __init__(self, form: TuckerCore) -> None:
        super().__init__()
        self.core = form.core
        self.directions = form.directions

    is_fresh = True

    def forward(self) -> ScoreForm:
        """The same launches as ``TuckerCore``."""
        core_hHrr = self.core.clone().float()
        core_hHrr.sum(0)
        return ScoreForm(core_hHrr, self.directions)


def build_dry(config: Config) -> LanguageModel:
    """The model of ``bench decode`` without a byte of memory, prepared for decoding, in bf16."""
    config = bench_config(config)
    with META:
        model = LanguageModel(config)
        for block in model.blocks:
            block.attention = GroupedQueryAttention(config.model)
    model.bfloat16()
    for memory in model.memory_layers:
        if isinstance(memory.retrieval.form, TuckerCore):
            form = _KnownDirections(memory.retrieval.form)
            memory.retrieval.add_module("form", form)
    with _as_on_a_gpu(_Watch(0.0)):
        prepare_for_decoding(model)
    with (
        torch.no_grad(),
        _as_on_a_gpu(_Watch(0.0)),
    ):  # derives the search keys, as the first step of a run does
        _step(model, 1, "none")()
    return model


def _step(model: LanguageModel, batch: int, kv_mode: KVMode) -> Callable[[], object]:
    pool = KVPool(model.config.model, batch, kv_mode, model.embedding.weight)
    tokens_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=META)
    return partial(model.hidden, tokens_B1, state=BenchState(model, batch, pool))


def count_launches(
    model: LanguageModel, batch: int, kv_mode: KVMode, touched_experts: float
) -> list[Launch]:
    """What a bf16 decode step of ``bench decode`` launches; embedding and head apart.

    Args:
        model: of :func:`build_dry`.
        batch: sequences of one token each.
        kv_mode: cached keys and values that a token sees.
        touched_experts: distinct ones that a step reads per layer.
    """
    watch, step = _Watch(touched_experts), _step(model, batch, kv_mode)
    with torch.no_grad(), _as_on_a_gpu(watch), watch:
        step()
    return watch.launches


@contextlib.contextmanager
def _as_on_a_gpu(watch: _Watch) -> Iterator[None]:
    """Operators that one kernel does there are noted as one, and give memory without a value."""

    def lookup(kernel: ReferenceKernel, *args: Any) -> Tensor:
        return _lookup(watch, *args)

    def attend(kernel: ReferenceKernel, *args: Any) -> Tensor:
        return _attend(watch, *args)

    def finds_rows(kernel: ReferenceKernel, weight: Tensor) -> bool:
        return True

    def find_rows(kernel: ReferenceKernel, *args: Any) -> FoundRows:
        return _find_rows(watch, *args)

    with contextlib.ExitStack() as patches:
        for operator in (lookup, attend, finds_rows, find_rows):
            patches.enter_context(mock.patch.object(ReferenceKernel, operator.__name__, operator))
        yield


def _find_rows(
    watch: _Watch, finder: RowFinder, x_TD: Tensor, state_TCD: Tensor | None, begins_T: None
) -> FoundRows:
    """The query projection, by torch where there is no convolution, and two programs."""
    num_tokens = x_TD.shape[0]
    _, num_heads, num_keys, rank, width = finder.keys_2Hnrd.shape
    if finder.conv_kD is None or state_TCD is None:
        queries_TO = F.linear(x_TD, finder.proj_OD)
    else:
        queries_TO = x_TD.new_empty(num_tokens, finder.proj_OD.shape[0])
        read = (x_TD, state_TCD, finder.conv_kD, finder.proj_OD, queries_TO)
        flops = 2.0 * num_tokens * finder.proj_OD.numel()
        num_bytes = sum(map(_num_bytes, read))
        watch.launches.append(Launch("convolve_project_program", num_bytes, flops))
    shape = (num_tokens, num_heads * finder.top_m)
    slots, permuted, rows, projectors = torch.empty(
        4, *shape, dtype=torch.int64, device=META
    ).unbind(0)
    found = FoundRows(
        slots,
        permuted,
        rows,
        projectors,
        torch.empty(*shape, _num_cores(finder), dtype=torch.float32, device=META),
    )
    # A block of 64 keys leaves its best behind, 8 bytes each.
    best = power_of_two(finder.top_m, 2)
    ranked_bytes = 8 * num_tokens * 2 * num_heads * math.ceil(num_keys / max(64, best)) * best
    num_bytes = sum(map(_num_bytes, (queries_TO, finder.search_2Hnsd))) + ranked_bytes
    flops = 2.0 * num_tokens * finder.search_2Hnsd.numel()
    watch.launches.append(Launch("search_program", num_bytes, flops))
    gathered = num_tokens * 2 * num_heads * finder.top_m * rank * width
    num_bytes = ranked_bytes + gathered * finder.keys_2Hnrd.element_size()
    num_bytes += sum(map(_num_bytes, (queries_TO, *found)))
    watch.launches.append(Launch("select_program", num_bytes))
    return found


def _num_cores(finder: RowFinder) -> int:
    return 1 if finder.core_hHrr is None else finder.core_hHrr.shape[0]


def _lookup(
    watch: _Watch, values_RV: Tensor, rows_TK: Tensor, projectors_TK: Tensor,
    scores_TKh: Tensor, num_projectors: int,
) -> Tensor:  # fmt: skip
    """One program: every row looked up is read, distinct or not (a cache may know better)."""
    width, size = values_RV.shape[1], values_RV.element_size()
    pooled_TEV = values_RV.new_empty(rows_TK.shape[0], num_projectors, width)
    asked = sum(map(_num_bytes, (rows_TK, projectors_TK, scores_TKh, pooled_TEV)))
    watch.launches.append(
        Launch("pool_rectangular_program", rows_TK.numel() * width * size + asked)
    )
    return pooled_TEV


def _attend(
    watch: _Watch, q_BASK: Tensor, keys_BACK: Tensor, values_BACK: Tensor,
    mask_BSC: Tensor | None, dropout: float,
) -> Tensor:  # fmt: skip
    """One fused kernel."""
    out_BASK = torch.empty_like(q_BASK)
    num_bytes = sum(map(_num_bytes, (q_BASK, keys_BACK, values_BACK, out_BASK)))
    flops = 4.0 * q_BASK.numel() * keys_BACK.shape[2]
    watch.launches.append(Launch("attention", num_bytes, flops))
    return out_BASK
