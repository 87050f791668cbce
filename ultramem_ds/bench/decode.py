"""``bench decode``: one decode step of dense, PKM, MoE and UltraMem side by side (section 4).

Rounds alternate over the models and over the probes of bandwidth and matrix rate, so that drift
and neighbours fall on all alike. A ratio with the mixture of experts counts only where that side
reaches ``FAIR_SHARE`` of its own roofline; others are void.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle, product
from typing import Any

import torch

from ultramem_ds.bench.common import Timing, header, time_alternating
from ultramem_ds.bench.decode_cost import (
    Part,
    RateProbes,
    Rates,
    Touched,
    paper_bytes,
    step_parts,
)
from ultramem_ds.bench.decode_formula import (
    formula_row,
    free_bytes,
    measured_rates,
    step_bytes,
)
from ultramem_ds.bench.decode_models import (
    BenchState,
    KVMode,
    KVPool,
    Routing,
    WeightBuffer,
    build_on,
    count_touched,
    elements_needed,
    force_routing,
)
from ultramem_ds.config.presets import preset
from ultramem_ds.config.schema import Config
from ultramem_ds.model.lm import LanguageModel

FAMILIES = {
    "151m": ("dense-151m", "pkm-151m-x12", "moe-151m-2in32", "ultramem-151m-x12"),
    "680m": ("dense-680m", "pkm-680m-x12", "moe-680m-2in33", "ultramem-680m-x12"),
    "1.6b": ("dense-1.6b", "pkm-1.6b-x12", "moe-1.6b-2in34", "ultramem-1.6b-x12"),
    "debug": ("dense-debug", "pkm-debug", "moe-debug", "ultramem-debug"),
}
KV_MODES: tuple[KVMode, ...] = ("none", "eighth", "full")
FAIR_SHARE = 0.7  # of the mixture's own roofline
RATIOS = (("moe", "ultramem"), ("moe", "pkm"), ("moe", "dense"), ("ultramem", "dense"))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_COUNTED_STEPS = 4  # over which distinct experts and rows are counted
_GRAPHS = 4  # replayed in turn; the weights read between two replays of one leave no cache warm
_PROBE_ELEMENTS = 1 << 27
_ROOM = 0.7  # of what is free may be taken


def check_steps(size: str, batches: Sequence[int], kv_modes: Sequence[str]) -> None:
    """Refuse an unknown family, no or an impossible batch, an unknown cache.

    Raises:
        ValueError: naming the option and what it takes.
    """
    if size not in FAMILIES:
        raise ValueError(f"--size {size}: use one of {sorted(FAMILIES)}")
    if not batches or min(batches) < 1:
        raise ValueError(f"--batch {batches}: at least one, each at least 1")
    for mode in kv_modes:
        if mode not in KV_MODES:
            raise ValueError(f"--kv {mode}: use some of {list(KV_MODES)}")


@dataclass(frozen=True, kw_only=True)
class DecodeBenchConfig:
    """What to measure and how.

    Attributes:
        size: family of four models.
        batches: sequences decoded together.
        kv_modes: cached keys and values that a token sees.
        dtype: of weights and activations.
        device: cpu or cuda.
        rounds: samples per model; at least 3.
        sample_s: seconds that a sample lasts at least.
        growth: also let UltraMem's table and MoE's experts grow.
        seed: of contents and routings.
    """

    size: str = "151m"
    batches: tuple[int, ...] = (1, 16, 32)
    kv_modes: tuple[KVMode, ...] = ("none",)
    dtype: str = "fp32"
    device: str = "cpu"
    rounds: int = 5
    sample_s: float = 0.3
    growth: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_steps(self.size, self.batches, self.kv_modes)
        if self.rounds < 3:
            raise ValueError(f"--rounds {self.rounds}: at least 3")


@dataclass(frozen=True)
class _Case:
    """One model under one routing, ready to step."""

    config: Config
    routing: Routing
    step: Callable[[], object]
    parts: list[Part]
    touched: Touched


class _Bench:
    def __init__(self, bench: DecodeBenchConfig, configs: dict[str, Config]) -> None:
        self.bench = bench
        self.configs = configs
        self.dtype = DTYPES[bench.dtype]
        size = max(_PROBE_ELEMENTS, *(elements_needed(config) for config in configs.values()))
        self.buffer = WeightBuffer(size, self.dtype, bench.device, bench.seed)
        self.probes = RateProbes(self.buffer.elements[:_PROBE_ELEMENTS])
        self.models = {name: build_on(self.buffer, config) for name, config in configs.items()}

    def synchronize(self) -> None:
        if self.bench.device == "cuda":
            torch.cuda.synchronize()

    def has_room(self, batch: int, mode: KVMode) -> bool:
        """Whether steps of that batch can be measured; says so if not."""
        width = self.dtype.itemsize
        needed = max(step_bytes(config, batch, mode, width) for config in self.configs.values())
        free = free_bytes(self.bench.device)
        if needed > _ROOM * free:
            print(
                f"batch {batch}, kv {mode}: by formula only, a step would hold "
                f"{needed / 1e9:.1f} GB and {free / 1e9:.1f} are free",
                file=sys.stderr,
            )
        return needed <= _ROOM * free

    def case(self, name: str, routing: Routing, batch: int, pool: KVPool) -> _Case:
        """Route, count what is touched, and make a step that can be called."""
        model, config = self.models[name], self.configs[name]
        force_routing(model, routing, batch, self.bench.seed)
        state = BenchState(model, batch, pool)
        step = _step(model, state, batch)
        touched = Touched(*count_touched(model, step, _COUNTED_STEPS))
        if self.bench.device == "cuda":
            step = _as_graphs(step)
        parts = step_parts(config, batch, self.dtype.itemsize, pool.num_bytes, touched)
        return _Case(config, routing, step, parts, touched)

    def measure(
        self, names: list[str], routing: Routing, batch: int, mode: KVMode
    ) -> Iterator[dict[str, Any]]:
        """Rows of some models under one routing, measured in alternation with the probes."""
        shape = self.configs[names[0]].model
        pool = KVPool(shape, batch, mode, self.buffer.elements)
        cases = {name: self.case(name, routing, batch, pool) for name in names}
        calls = {name: case.step for name, case in cases.items()}
        timings = time_alternating(
            {**calls, **self.probes.calls},
            rounds=self.bench.rounds,
            sample_s=self.bench.sample_s,
            synchronize=self.synchronize,
        )
        rates = self.probes.rates({name: t.median_ms for name, t in timings.items()})
        rows = [self._row(case, timings[name], rates, batch, mode) for name, case in cases.items()]
        moe = [row["roofline_share"] for row in rows if row["kind"] == "moe"]
        for row in rows:
            row["fair"] = all(share >= FAIR_SHARE for share in moe)
            yield row

    def _row(
        self, case: _Case, timing: Timing, rates: Rates, batch: int, mode: KVMode
    ) -> dict[str, Any]:
        return {
            "preset": case.config.preset,
            "kind": case.config.model.kind,
            "batch": batch,
            "kv_mode": mode,
            "routing": case.routing,
            **timing.as_row(),
            "bytes_read": round(sum(part.num_bytes for part in case.parts)),
            "bytes_read_kv": round(
                sum(part.num_bytes for part in case.parts if part.name == "kv cache")
            ),
            "bytes_sparse_paper": paper_bytes(case.config, batch, self.dtype.itemsize),
            "flops": round(sum(part.num_flops for part in case.parts)),
            "distinct_experts": case.touched.experts,
            "distinct_rows": case.touched.rows,
            "roofline_ms": rates.least_ms(case.parts),
            "roofline_share": rates.least_ms(case.parts) / timing.median_ms,
            "bandwidth_bytes_per_s": rates.bytes_per_s,
            "matmul_flops_per_s": rates.flops_per_s,
        }


def _step(model: LanguageModel, state: BenchState, batch: int) -> Callable[[], object]:
    weight = model.embedding.weight
    generator = torch.Generator().manual_seed(batch)
    tokens_B1 = torch.randint(weight.shape[0], (batch, 1), generator=generator).to(weight.device)

    @torch.no_grad()
    def step() -> object:
        return model.hidden(tokens_B1, state=state)[0]

    return step


def _as_graphs(step: Callable[[], object]) -> Callable[[], object]:
    """``step`` as ``generate`` runs it on a GPU: as CUDA graphs, each of another routing."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graphs: list[torch.cuda.CUDAGraph] = []
    for _ in range(_GRAPHS):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=graphs[0].pool() if graphs else None):
            step()
        graphs.append(graph)
    turn = cycle(graphs)

    def replay(alive: object = step) -> None:  # whose tensors the graphs read
        next(turn).replay()

    return replay


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Time ratios per batch and KV mode; ``void`` where the mixture's side is not fair."""
    by_case: dict[tuple[int, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_case.setdefault((row["batch"], row["kv_mode"]), {})[row["kind"]] = row
    return [
        {
            "ratio": f"{above}/{below}",
            "batch": batch,
            "kv_mode": mode,
            "value": kinds[above]["time_ms"] / kinds[below]["time_ms"],
            "void": "moe" in (above, below) and not kinds[above]["fair"],
        }
        for (batch, mode), kinds in by_case.items()
        for above, below in RATIOS
    ]


def run_decode_bench(bench: DecodeBenchConfig) -> dict[str, Any]:
    """Measure and return the document of DESIGN section 7; see docs/benchmarks/decode.md.

    Rows carry ``{preset, batch, kv_mode, time_ms, bytes_read, roofline_share, fair}`` and more, one
    per (preset, batch, KV mode), under forced-uniform routing; other routings are in
    ``other_rows``, the growth of tables and experts in ``growth_rows``. ``formula_rows`` have every
    batch, also those for which this machine has no room, at the rates that its probes found.
    """
    configs = {name: preset(name) for name in FAMILIES[bench.size]}
    setup = _Bench(bench, configs)
    sparse = [name for name, config in configs.items() if config.model.kind != "dense"]
    mixtures = [name for name in sparse if configs[name].model.kind == "moe"]
    rows: list[dict[str, Any]] = []
    other_rows: list[dict[str, Any]] = []
    for mode, batch in product(bench.kv_modes, bench.batches):
        if setup.has_room(batch, mode):
            rows += setup.measure(list(configs), "forced-uniform", batch, mode)
            other_rows += setup.measure(sparse, "own", batch, mode)
            other_rows += setup.measure(mixtures, "iid-uniform", batch, mode)
    del setup
    rates, width = measured_rates(rows), DTYPES[bench.dtype].itemsize
    document = {
        "rows": rows,
        "ratios": ratios(rows),
        "other_rows": other_rows,
        "formula_rows": [
            formula_row(config, batch, mode, width, rates)
            for mode, batch in product(bench.kv_modes, bench.batches)
            for config in configs.values()
        ],
    }
    if bench.growth:
        document["growth_rows"] = _growth(bench, configs)
    return {**document, **header(asdict(bench))}


def _growth(bench: DecodeBenchConfig, configs: dict[str, Config]) -> list[dict[str, Any]]:
    """UltraMem with 1/16, 1/4 and all of its rows, MoE with 1/4, 1/2 and all of its experts."""
    grown: dict[str, Config] = {}
    for config in configs.values():
        if config.model.kind == "ultramem":
            for part in (4, 2, 1):
                memory = replace(config.memory, knum=config.memory.knum // part)
                grown[f"ultramem/{part * part}"] = replace(config, memory=memory)
        if config.model.kind == "moe":
            for part in (4, 2, 1):
                moe = replace(config.moe, num_experts=config.moe.num_experts // part)
                grown[f"moe/{part}"] = replace(config, moe=moe)
    setup = _Bench(bench, grown)
    rows = []
    for batch in bench.batches:
        if not setup.has_room(batch, "none"):
            continue
        measured = setup.measure(list(grown), "forced-uniform", batch, "none")
        for name, row in zip(grown, measured):
            config = grown[name]
            is_mixture = config.model.kind == "moe"
            units = config.moe.num_experts if is_mixture else config.memory.num_rows
            rows.append({**row, "variant": name, "experts_or_rows": units})
    return rows
