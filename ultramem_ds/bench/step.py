"""``bench step``: what a training step costs, by the engine that ``train`` drives.

Every variant is a :class:`TrainEngine` on gloo or NCCL ranks, with its clipping, gate, statistics
and ZeRO stage; ``plain`` is the dense model in a loop of plain PyTorch with the same optimizer, to
say what the framework itself costs. The dense model's inner width is raised until its FLOPs per
token are UltraMem's. Tokens are uniform random: natural text repeats rows, which favours the
row-sparse optimizers further. Rounds alternate between the variants, all ranks in step.
"""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from ultramem_ds.bench.common import Timing, header, keep_freed_memory
from ultramem_ds.config.deepspeed import load_deepspeed_json
from ultramem_ds.config.memory import TableOptimizer
from ultramem_ds.config.presets import preset
from ultramem_ds.config.schema import Config
from ultramem_ds.data.micro_batch import MicroBatch
from ultramem_ds.model.accounting import count
from ultramem_ds.model.init import init_module
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.optim.param_groups import build_param_groups
from ultramem_ds.planning.batches import plan_batches
from ultramem_ds.sharding.comm import Comm
from ultramem_ds.telemetry.phases import Phases
from ultramem_ds.testing.distributed import run_ranks
from ultramem_ds.train.engine import TrainEngine
from ultramem_ds.zero.runtime import Ranks

WARMUP = 3  # steps of every variant before the first round
TIMEOUT_S = 3600.0
PHASES = ("forward", "backward", "optimizer")

# variant -> preset of the shape, and the tables' optimizer; plain stands beside them
VARIANTS: dict[str, tuple[str, TableOptimizer]] = {
    "plain": ("dense", "dense"),
    "dense": ("dense", "dense"),
    "moe": ("moe", "dense"),
    "ultramem": ("ultramem", "dense"),
    "ultramem-row-sparse": ("ultramem", "row-sparse"),
    "ultramem-catch-up": ("ultramem", "row-sparse-catch-up"),
}
# The same with ``train.compile``: asked for by name, for compiling takes a minute or more.
COMPILED = {f"{name}-compiled": VARIANTS[name] for name in ("dense", "moe", "ultramem")}


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
    ranks: tuple[int, ...] = (1, 2)
    sequences: tuple[int, ...] = (16,)  # per rank and step
    seq_len: int = 128
    knums: tuple[int, ...] = (0,)  # rows of a table = knum^2; 0 = the shape's
    variants: tuple[str, ...] = tuple(VARIANTS)
    precision: Literal["fp32", "bf16"] = "fp32"
    rounds: int = 7
    keep_memory: bool = False  # see ``common.keep_freed_memory``

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"--shape {self.shape}: use one of {sorted(SHAPES)}")
        known = VARIANTS | COMPILED
        unknown = [name for name in self.variants if name not in known]
        if unknown:
            raise ValueError(f"--variants {unknown[0]}: use some of {sorted(known)}")
        if self.rounds < 2:
            raise ValueError(f"--rounds {self.rounds}: at least 2 are needed for a spread")


def equal_flops_dense(dense: Config, other: Config) -> Config:
    """``dense`` with its inner width raised to the FLOPs per token of ``other``."""
    missing = count(other).activated_params - count(dense).activated_params
    per_unit = 2 * dense.model.hidden_size * dense.model.num_layers
    inner = dense.model.inner_size + round(missing / per_unit)
    return replace(dense, model=replace(dense.model, inner_size=inner))


@dataclass(frozen=True)
class Measured:
    """One variant's rounds on one rank.

    Attributes:
        samples_ms: a step each.
        phases_ms: mean of each phase over those steps; empty for ``plain``.
    """

    samples_ms: list[float]
    phases_ms: dict[str, float]


def run_step_bench(bench: StepBenchConfig) -> dict[str, Any]:
    """Measure and return ``{"rows": [{variant, tokens, direction, time_ms, ...}], ...}``."""
    if bench.keep_memory:
        keep_freed_memory()
    rows: list[dict[str, Any]] = []
    for knum in bench.knums:
        for sequences in bench.sequences:
            for ranks in bench.ranks:
                configs = step_configs(bench, knum, sequences * ranks)
                found = run_ranks(
                    _measure,
                    ranks,
                    bench,
                    configs,
                    timeout_s=TIMEOUT_S,
                    backend="nccl" if torch.cuda.is_available() else "gloo",
                )[0]
                rows += _rows(configs, found, ranks, sequences * ranks * bench.seq_len)
    return {"rows": rows, **header(asdict(bench))}


def _rows(
    configs: dict[str, Config], found: dict[str, Measured], ranks: int, tokens: int
) -> Iterator[dict[str, Any]]:
    base = found.get("dense")
    for name, measured in found.items():
        config, timing = configs[name], Timing.of(measured.samples_ms)
        # Round by round, so that the machine's drift falls on both.
        ratios = [a / b for a, b in zip(base.samples_ms, measured.samples_ms)] if base else []
        yield {
            "variant": name,
            "ranks": ranks,
            "tokens": tokens,
            "direction": "step",
            **timing.as_row(),
            "tokens_per_s": tokens / timing.median_ms * 1e3,
            "speed_of_dense": sorted(ratios)[len(ratios) // 2] if ratios else None,
            **{f"{phase}_ms": measured.phases_ms.get(phase) for phase in PHASES},
            "flops_per_token": count(config).flops_per_token,
            "params": count(config).params,
            "table_rows": config.memory.num_rows if config.has_memory else 0,
        }


def step_configs(bench: StepBenchConfig, knum: int, global_batch_size: int) -> dict[str, Config]:
    """The configuration of every variant that ``bench`` asks for."""
    shape = SHAPES[bench.shape]
    configs: dict[str, Config] = {}
    for name in {"ultramem": None, **dict.fromkeys(bench.variants)}:
        role, table_optimizer = (VARIANTS | COMPILED)[name]
        config = preset(getattr(shape, role))
        model = replace(
            config.model,
            dropout=0.0,
            vocab_size=4096,
            num_layers=shape.num_layers,
            seq_len=bench.seq_len,
        )
        memory = replace(
            config.memory,
            placement=shape.placement,
            knum=knum or shape.knum,
            table_optimizer=table_optimizer,
        )
        moe = replace(config.moe, num_experts=shape.num_experts)
        train = replace(
            config.train,
            global_batch_size=global_batch_size,
            precision=bench.precision,
            compile=name in COMPILED,
        )
        configs[name] = replace(config, model=model, memory=memory, moe=moe, train=train)
    for name in ("plain", "dense", "dense-compiled"):
        if name in configs:
            configs[name] = equal_flops_dense(configs[name], configs["ultramem"])
    return {name: configs[name] for name in bench.variants}


def _measure(
    rank: int, world_size: int, bench: StepBenchConfig, configs: dict[str, Config]
) -> dict[str, Measured]:
    """Body of every rank: all variants, a step each per round."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    ranks, comm = Ranks(rank, world_size, rank, device), Comm()
    steps: dict[str, Callable[[], object]] = {}
    phases: dict[str, Phases] = {}
    for name, config in configs.items():
        if name == "plain":
            if world_size == 1:
                steps[name] = _plain_step(config, device)
            continue
        phases[name] = Phases()
        steps[name] = engine_step(config, ranks, phases[name])
    for step in steps.values():
        for _ in range(WARMUP):
            step()
    for clock in phases.values():
        clock.take_seconds()
    samples_ms: dict[str, list[float]] = defaultdict(list)
    order = list(steps)
    for index in range(bench.rounds):
        for name in order[index % len(order) :] + order[: index % len(order)]:
            comm.barrier()
            begin = time.perf_counter()
            steps[name]()
            comm.barrier()
            samples_ms[name].append(1e3 * (time.perf_counter() - begin))
    return {
        name: Measured(samples_ms[name], _mean_phases(phases.get(name), bench.rounds))
        for name in order
    }


def _mean_phases(phases: Phases | None, steps: int) -> dict[str, float]:
    if phases is None:
        return {}
    return {name: 1e3 * seconds / steps for name, seconds in phases.take_seconds().items()}


def _tokens(config: Config, world_size: int, device: torch.device) -> torch.Tensor:
    """A batch of this rank (B, S + 1)."""
    shape = (config.train.global_batch_size // world_size, config.model.seq_len + 1)
    return torch.randint(config.model.vocab_size, shape, device=device)


def engine_step(config: Config, ranks: Ranks, phases: Phases) -> Callable[[], object]:
    """A call that takes one optimizer step of ``train``'s engine on random tokens."""
    per_rank = config.train.global_batch_size // ranks.world_size
    config = replace(config, train=replace(config.train, micro_batch_size=per_rank))
    batches = plan_batches(config, ranks.world_size)
    json = load_deepspeed_json(None, config.model.kind)
    engine = TrainEngine(config, ranks, json, batches, phases)
    tokens_BS1 = _tokens(config, ranks.world_size, ranks.device)

    def micro_batches() -> Iterator[MicroBatch]:
        while True:
            yield MicroBatch(tokens=tokens_BS1, sample_ids=())

    source, step = micro_batches(), 0

    def take() -> object:
        nonlocal step
        step += 1
        return engine.train_step(source, step)

    return take


def _plain_step(config: Config, device: torch.device) -> Callable[[], object]:
    """The same model, batch, clipping and optimizer in a loop that anyone would write."""
    model = LanguageModel(config).to(device)
    init_module(model, config, seed=0)
    optim = config.optim
    optimizer = torch.optim.AdamW(
        [dict(group) for group in build_param_groups(model.named_parameters(), optim)],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )
    tokens_BS1 = _tokens(config, 1, device)
    bf16 = config.train.precision == "bf16"

    def step() -> object:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = model(tokens_BS1)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step
