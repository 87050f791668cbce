"""``bench layer``: our memory layer against a plain-torch transcription of the paper's formulas.

The transcription (``bench/layer_oracle``) is held against the times of the authors' layer measured
once on a machine of this class (2 cores, fp32); where it is more than a third slower than those,
its row is void: the yardstick would be too kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ultramem_ds.bench.common import header, keep_freed_memory, time_alternating
from ultramem_ds.bench.layer_oracle import OracleLayer
from ultramem_ds.config.presets import preset
from ultramem_ds.infer.prepare import prepare_for_decoding
from ultramem_ds.kernels.hugepages import advise_huge_pages
from ultramem_ds.model.init import init_parameter
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.model.memory.layer import MemoryLayer
from ultramem_ds.model.memory.lookup import ValueTable

# The authors' layer, milliseconds per call on 2 cores, fp32, D 1024, knum 1100, kdim 256, V 512,
# m 16, H 2, r 2, h 2, E 4.
AUTHORS_MS = {1: 38.0, 64: 43.0, 2048: 690.0}
_VOID_FACTOR = 4 / 3


@dataclass(frozen=True, kw_only=True)
class LayerBenchConfig:
    """Shape by preset, tokens per call, and how to measure."""

    preset: str = "ultramem-151m-x12"
    tokens: tuple[int, ...] = (1, 64, 2048)
    knum: int = 0  # rows of the table = knum^2; 0 = the preset's
    rounds: int = 5
    keep_memory: bool = False  # see ``common.keep_freed_memory``
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.tokens or min(self.tokens) < 1:
            raise ValueError(f"tokens={self.tokens}: at least one count, each at least 1")


def run_layer_bench(bench: LayerBenchConfig) -> dict[str, Any]:
    """Measure and return ``{"rows": [{variant, tokens, direction, time_ms, ...}], ...}``.

    Variants: ``oracle`` the transcription, ``layer`` the module that trains (evaluation mode),
    ``layer-decode`` the same prepared for decoding. ``speedup``: the oracle's time over the row's.
    """
    if bench.keep_memory:
        keep_freed_memory()
    config = preset(bench.preset)
    trained, decoding = _layers(bench)
    oracle = OracleLayer(trained, config.memory.expansion, config.model.norm_eps)
    rows: list[dict[str, Any]] = []
    for tokens in bench.tokens:
        x_TD = torch.randn(tokens, config.model.hidden_size)
        calls: dict[str, Callable[[], object]] = {
            "oracle": partial(oracle, x_TD),
            "layer": partial(_run, trained, x_TD),
            "layer-decode": partial(_run, decoding, x_TD),
        }
        with torch.no_grad():
            difference = float((_run(trained, x_TD)[0] - oracle(x_TD)).abs().max())
            timings = time_alternating(calls, rounds=bench.rounds)
        reference_ms = timings["oracle"].median_ms
        authors_ms = AUTHORS_MS.get(tokens)
        rows += [
            {
                "variant": name,
                "tokens": tokens,
                "direction": "forward",
                **timing.as_row(),
                "speedup": reference_ms / timing.median_ms,
                "authors_ms": authors_ms,
                "void": authors_ms is not None and reference_ms > _VOID_FACTOR * authors_ms,
                "max_difference": difference,
            }
            for name, timing in timings.items()
        ]
    return {"rows": rows, **header(asdict(bench))}


def _run(layer: MemoryLayer, x_TD: torch.Tensor) -> torch.Tensor:
    return layer.finish(layer.start(x_TD[None]))


def _layers(bench: LayerBenchConfig) -> tuple[MemoryLayer, MemoryLayer]:
    """The layer as it trains and prepared for decoding, on one table."""
    config = preset(bench.preset)
    memory = replace(config.memory, placement="1:1", knum=bench.knum or config.memory.knum)
    model = replace(config.model, num_layers=1, vocab_size=256, dropout=0.0)
    config = replace(config, model=model, memory=memory)
    table = torch.empty(memory.num_rows, memory.value_dim)
    advise_huge_pages(table)
    table.uniform_(-1, 1, generator=torch.Generator().manual_seed(bench.seed))
    holder = ValueTable(1, memory.value_dim, table_index=0)
    holder.weight = nn.Parameter(table, requires_grad=False)
    models = [LanguageModel(config, make_table=lambda _: holder).eval() for _ in range(2)]
    for one in models:
        for name, param in one.named_parameters():
            if param is not holder.weight:
                init_parameter(name, param, config, bench.seed)
    return models[0].memory_layers[0], prepare_for_decoding(models[1]).memory_layers[0]
