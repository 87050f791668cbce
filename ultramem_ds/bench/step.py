"""``bench step``: training tokens per second at equal FLOPs: dense, MoE, UltraMem.

The dense model's inner width is raised until its FLOPs per token are UltraMem's. One process, fp32,
no dropout; a step is forward, backward and Adam over everything but the tables, whose touched rows
alone are updated (``memory.table_optimizer=row-sparse``). MoE drops no token: every expert computes
all tokens routed to it (capacity unlimited), by the one-process module that evaluation uses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, cast

import torch

from ultramem_ds.bench.common import header, keep_freed_memory, time_alternating
from ultramem_ds.config.presets import preset
from ultramem_ds.config.schema import Config
from ultramem_ds.kernels import lookup_reduce, row_adam_
from ultramem_ds.model.accounting import count
from ultramem_ds.model.init import init_module
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.model.memory.lookup import FinishedLookup, ValueTable


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """Three presets of one size, cut down until their training states fit a small machine.

    Attributes:
        dense: preset whose inner width is raised.
        moe: preset of the mixture.
        ultramem: preset that gives the FLOPs.
        num_layers: blocks of each.
        placement: of UltraMem's memory layers.
        num_experts: of the mixture; fewer than the preset's favours it (less memory, same FLOPs).
        knum: rows of a table = knum^2, unless asked for otherwise.
    """

    dense: str
    moe: str
    ultramem: str
    num_layers: int
    placement: str
    num_experts: int
    knum: int


SHAPES = {
    "debug": StepShape(
        dense="dense-debug",
        moe="moe-debug",
        ultramem="ultramem-debug",
        num_layers=4,
        placement="1:2/3:4",
        num_experts=16,
        knum=192,
    ),
    # One memory layer for four blocks, as in the whole model.
    "151m-layers": StepShape(
        dense="dense-151m",
        moe="moe-151m-2in32",
        ultramem="ultramem-151m-x12",
        num_layers=4,
        placement="2:4",
        num_experts=8,
        knum=550,
    ),
}


@dataclass(frozen=True, kw_only=True)
class StepBenchConfig:
    """Which shape, how many tokens per step, and how to measure."""

    shape: str = "debug"
    sequences: tuple[int, ...] = (4, 16)
    seq_len: int = 128
    knums: tuple[int, ...] = (0,)  # rows of a table = knum^2; 0 = the shape's
    rounds: int = 5
    keep_memory: bool = False  # see ``common.keep_freed_memory``

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"--shape {self.shape}: use one of {sorted(SHAPES)}")


class RowSparseLookup:
    """A local table whose touched rows alone Adam updates (``kernels.row_adam_``)."""

    def __init__(self, table: ValueTable, num_projectors: int) -> None:
        self.table = table
        self.num_projectors = num_projectors
        self.moments = torch.zeros_like(table.weight), torch.zeros_like(table.weight)
        self.pending: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.step = 0

    def start(
        self, rows_TK: torch.Tensor, projectors_TK: torch.Tensor, scores_TKh: torch.Tensor
    ) -> FinishedLookup:
        """See ``model.memory.lookup.Lookup``."""
        values_RV = self.table.weight.detach()
        rows_U, local_TK = torch.unique(rows_TK, return_inverse=True)
        values_UV = values_RV.index_select(0, rows_U)
        grad_UV = torch.zeros_like(values_UV)
        self.pending.append((rows_U, grad_UV))
        pooled_TEV = lookup_reduce(
            values_UV,
            local_TK,
            projectors_TK,
            scores_TKh,
            self.num_projectors,
            grad_values_RV=grad_UV,
        )
        return FinishedLookup(pooled_TEV)

    def update(self) -> None:
        """Step the rows; after the backward."""
        self.step += 1
        values_RV = self.table.weight.detach()
        for rows_U, grad_UV in self.pending:
            row_adam_(rows_U, grad_UV, values_RV, *self.moments, step=self.step, lr=1e-4)
        self.pending.clear()


def equal_flops_dense(dense: Config, other: Config) -> Config:
    """``dense`` with its inner width raised to the FLOPs per token of ``other``."""
    missing = count(other).activated_params - count(dense).activated_params
    per_unit = 2 * dense.model.hidden_size * dense.model.num_layers
    inner = dense.model.inner_size + round(missing / per_unit)
    return replace(dense, model=replace(dense.model, inner_size=inner))


def run_step_bench(bench: StepBenchConfig) -> dict[str, Any]:
    """Measure and return ``{"rows": [{variant, tokens, direction, time_ms, ...}], ...}``."""
    if bench.keep_memory:
        keep_freed_memory()
    rows: list[dict[str, Any]] = []
    for knum in bench.knums:
        configs = _configs(bench, knum)
        models = {name: _training_step(config) for name, config in configs.items()}
        for sequences in bench.sequences:
            shape = (sequences, bench.seq_len + 1)
            tokens_BS1 = torch.randint(configs["dense"].model.vocab_size, shape)
            calls: dict[str, Callable[[], object]] = {
                name: partial(step, tokens_BS1) for name, step in models.items()
            }
            tokens = sequences * bench.seq_len
            for name, timing in time_alternating(calls, rounds=bench.rounds).items():
                config = configs[name]
                rows.append(
                    {
                        "variant": name,
                        "tokens": tokens,
                        "direction": "step",
                        **timing.as_row(),
                        "tokens_per_s": tokens / timing.median_ms * 1e3,
                        "flops_per_token": count(config).flops_per_token,
                        "params": count(config).params,
                        "table_rows": config.memory.num_rows if config.has_memory else 0,
                        "moe_capacity": "no token dropped" if name == "moe" else None,
                    }
                )
    return {"rows": rows, **header(asdict(bench))}


def _configs(bench: StepBenchConfig, knum: int) -> dict[str, Config]:
    shape = SHAPES[bench.shape]
    configs = {}
    for name in ("dense", "moe", "ultramem"):
        config = preset(getattr(shape, name))
        model = replace(config.model, dropout=0.0, vocab_size=4096, num_layers=shape.num_layers)
        memory = replace(config.memory, placement=shape.placement, knum=knum or shape.knum)
        moe = replace(config.moe, num_experts=shape.num_experts)
        configs[name] = replace(config, model=model, memory=memory, moe=moe)
    configs["dense"] = equal_flops_dense(configs["dense"], configs["ultramem"])
    return configs


def _training_step(config: Config) -> Callable[[torch.Tensor], object]:
    model = LanguageModel(config)
    init_module(model, config, seed=0)
    for memory in model.memory_layers:
        memory.values.weight.requires_grad_(False)
        memory.lookup = RowSparseLookup(memory.values, config.memory.expansion)
    lookups = [cast(RowSparseLookup, memory.lookup) for memory in model.memory_layers]
    parameters = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step(tokens_BS1: torch.Tensor) -> object:
        terms = model(tokens_BS1)
        loss = terms["loss"] + terms["aux_loss"] + terms["balance_loss"]
        loss.backward()
        optimizer.step()
        for lookup in lookups:
            lookup.update()
        optimizer.zero_grad()
        model.mark_stale()
        return loss

    return step
