"""What one decode step must read and multiply, and how fast this machine could do it.

A step is a row of products, one after another. Each takes at least the larger of its bytes over
the memory's bandwidth and its operations over the arithmetic's rate; their sum is the step's
roofline. Bandwidth and rate are measured in the same run as the step.

Letters: B tokens of a step, D hidden, F inner width, X experts, k experts per token, H memory
heads, n keys per side, r Tucker rank, d kdim, m top-m, K = m*H, V value width, E expansion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ultramem_ds.config.schema import Config
from ultramem_ds.kernels import resolve
from ultramem_ds.model.accounting import query_width

_PROBE_ROWS = 56  # four full runs of the packed product's registers
_PROBE_WIDTH = 1024
_PROBE_SQUARE = 2048


@dataclass(frozen=True)
class Part:
    """One product, or one run of reads, of a decode step.

    Attributes:
        name: for people.
        num_bytes: distinct bytes of weights, rows and cache that it reads.
        num_flops: multiplications and additions.
    """

    name: str
    num_bytes: float
    num_flops: float


@dataclass(frozen=True)
class Touched:
    """Distinct experts and table rows that a step reads, per layer."""

    experts: float
    rows: float


def step_parts(
    config: Config, batch: int, element_size: int, kv_bytes: int, touched: Touched
) -> list[Part]:
    """The products of one decode step through all blocks; embedding and head apart.

    Args:
        config: of the model.
        batch: B, sequences of one token each.
        element_size: bytes of a weight.
        kv_bytes: keys and values read, all blocks.
        touched: as counted.
    """
    model, memory = config.model, config.memory
    D, L = model.hidden_size, model.num_layers

    def matrix(name: str, size: float, times: int) -> Part:
        return Part(name, times * size * element_size, times * 2.0 * batch * size)

    parts = [matrix("attention", 4 * D * D, L)]
    # Every cached element meets the query heads that it serves: 1 for full, 8 for an eighth.
    full_elements = 0 if kv_bytes == 0 else 2 * L * batch * D * 2048
    parts.append(Part("kv cache", kv_bytes, 2.0 * full_elements))
    expert = 2 * D * model.inner_size
    if model.kind == "moe":
        parts.append(matrix("gate", D * config.moe.num_experts, L))
        flops = L * 2.0 * batch * config.moe.top_k * expert
        parts.append(Part("experts", L * touched.experts * expert * element_size, flops))
    else:
        parts.append(matrix("mlp", expert, L))
    if config.has_memory:
        count = len(memory.spans)
        projection = memory.value_proj * memory.expansion * memory.value_dim * D
        ranks = memory.tucker_rank if memory.query == "per-head-shared-sides" else 1
        keys = 2 * memory.num_heads * memory.num_keys * memory.kdim
        candidates = 2 * memory.rows_per_token * memory.tucker_rank * memory.kdim
        exact = min(batch * candidates, memory.tucker_rank * keys)
        rows = count * touched.rows * memory.value_dim
        pooled = 2.0 * count * batch * memory.rows_per_token * memory.value_dim
        parts += [
            matrix("query", D * query_width(memory), count),
            matrix("key search", keys * ranks, count),
            Part("candidates", count * exact * element_size, 2.0 * count * batch * candidates),
            Part("table rows", rows * element_size, pooled),
            matrix("value projection", projection, count),
        ]
    return parts


def paper_bytes(config: Config, batch: int, element_size: int) -> int:
    """Sparse weights read per step by the paper's formula (section 4), all layers.

    ``min(2 B, X) * 2 D^2`` per block of experts, ``min(B K, N) * V`` per memory layer, where the
    paper writes D/2 for V and m for K; 0 for a dense model.
    """
    model, memory = config.model, config.memory
    if model.kind == "moe":
        chosen = min(config.moe.top_k * batch, config.moe.num_experts)
        return model.num_layers * chosen * 2 * model.hidden_size**2 * element_size
    if config.has_memory:
        rows = min(batch * memory.rows_per_token, memory.num_rows)
        return len(memory.spans) * rows * memory.value_dim * element_size
    return 0


@dataclass(frozen=True)
class Rates:
    """What the machine was measured to do.

    Attributes:
        bytes_per_s: reads from memory.
        flops_per_s: matrix products.
    """

    bytes_per_s: float
    flops_per_s: float

    def least_ms(self, parts: Sequence[Part]) -> float:
        """The roofline of products done one after another."""
        return 1e3 * sum(
            max(part.num_bytes / self.bytes_per_s, part.num_flops / self.flops_per_s)
            for part in parts
        )


class RateProbes:
    """Calls whose times give :class:`Rates`; run among the models, to meet the same machine.

    Bandwidth: a sum, and the product of one row with a large matrix; rate: a square product, and
    one of a few rows with a small matrix. The faster of each counts.

    Args:
        memory: elements to read, far more than a cache holds.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        panels = memory.numel() // (32 * _PROBE_WIDTH)
        self.memory = memory[: panels * 32 * _PROBE_WIDTH]
        self.square = torch.rand(_PROBE_SQUARE, _PROBE_SQUARE).to(memory)
        self.calls: dict[str, Callable[[], object]] = {
            "read/sum": self.memory.sum,
            "multiply/square": lambda: self.square @ self.square,
        }
        self.work: dict[str, float] = {
            "read/sum": self.memory.nbytes,
            "multiply/square": 2.0 * _PROBE_SQUARE**3,
        }
        self.kernel = resolve("auto", memory.device)
        if self.kernel.packs(memory):
            packed = self.memory.view(1, panels, _PROBE_WIDTH, 32)
            shape = self.kernel.packed_shape(1024, 1024, dtype=memory.dtype)
            small = self.memory[: 1 << 20].view(1, *shape)
            one, many = torch.rand(1, _PROBE_WIDTH), torch.rand(_PROBE_ROWS, _PROBE_WIDTH)
            self._packed(packed, one, panels * 32, "read/packed", self.memory.nbytes)
            self._packed(small, many, 1024, "multiply/packed", 2.0 * _PROBE_ROWS * 1024 * 1024)

    def _packed(
        self, weights: torch.Tensor, x: torch.Tensor, outputs: int, name: str, work: float
    ) -> None:
        ends = torch.tensor([x.shape[0]])
        self.calls[name] = lambda: self.kernel.grouped_linear(x, weights, ends, outputs)
        self.work[name] = work

    def rates(self, times_ms: dict[str, float]) -> Rates:
        """Rates from the probes' times."""
        per_s = {name: work / (times_ms[name] * 1e-3) for name, work in self.work.items()}
        return Rates(
            max(rate for name, rate in per_s.items() if name.startswith("read")),
            max(rate for name, rate in per_s.items() if name.startswith("multiply")),
        )
