"""``bench predict``: what the hardware allows, before anything is measured on it.

Three numbers per decode step and GPU. The *roofline*: every product at the larger of its bytes over
the published bandwidth and its operations over the published rate. The *launch-bound* time: the
same over every operator that the step really launches (``launches.py``), none of which takes less
than ``launch_us``, the time from one kernel of a CUDA graph to the next. That one is fitted to one
measured step (``LAUNCH_US``) and carried over to the other GPUs, where it is an assumption. Third,
where a measurement is given, the measured time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from ultramem_ds.bench.common import header
from ultramem_ds.bench.decode import FAMILIES, check_steps
from ultramem_ds.bench.decode_cost import Part, Rates, Touched, paper_bytes, step_parts
from ultramem_ds.bench.decode_models import KV_LENGTH, KVMode
from ultramem_ds.bench.kernel_cost import LookupShape, lookup_programs
from ultramem_ds.bench.launches import Launch, build_dry, count_launches
from ultramem_ds.config.presets import preset
from ultramem_ds.config.schema import Config
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.planning.costs import distinct_rows
from ultramem_ds.telemetry.peak_flops import data_sheet_flops_per_s

# GB/s of the SXM part's memory, from the vendor's data sheets; bf16 rates: telemetry/peak_flops.py.
_BANDWIDTH_GB_PER_S = {"A100": 2039.0, "H100": 3350.0, "H200": 4800.0, "B200": 8000.0}
GPUS = tuple(_BANDWIDTH_GB_PER_S)
# From one kernel of a graph to the next: fitted to the dense model's step at batch 1 in
# docs/gpu/data/decode-151m.json (H200), with the bandwidth and rate measured there.
LAUNCH_US = 3.05
BF16 = 2


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """What to predict.

    Attributes:
        size: family of four models.
        batches: sequences decoded together.
        kv_modes: cached keys and values that a token sees.
        launch_us: least time of a launch within a graph; 0: bytes and operations alone.
        lookup_tokens: of the lookups.
        table_bytes: of a table element, in the lookups.
    """

    size: str = "1.6b"
    batches: tuple[int, ...] = (1, 16, 64, 256)
    kv_modes: tuple[KVMode, ...] = ("none",)
    launch_us: float = LAUNCH_US
    lookup_tokens: tuple[int, ...] = (64, 2048)
    table_bytes: int = BF16

    def __post_init__(self) -> None:
        check_steps(self.size, self.batches, self.kv_modes)
        if not self.launch_us >= 0:
            raise ValueError(f"--launch-us {self.launch_us}: 0 or more")


def published(gpu: str) -> Rates:
    """A GPU's published rates."""
    flops_per_s = data_sheet_flops_per_s(gpu)
    assert flops_per_s is not None
    return Rates(_BANDWIDTH_GB_PER_S[gpu] * 1e9, flops_per_s)


def touched_by(config: Config, batch: int) -> Touched:
    """Experts and rows that a step reads when routing is uniform and experts are balanced."""
    experts, rows = 0.0, 0.0
    if config.model.kind == "moe":
        experts = float(min(config.moe.top_k * batch, config.moe.num_experts))
    if config.has_memory:
        memory = config.memory
        rows = distinct_rows(batch * memory.rows_per_token, memory.num_rows)
    return Touched(experts, rows)


def kv_bytes(config: Config, batch: int, mode: KVMode) -> int:
    """Cached keys and values that a bf16 step reads, all blocks."""
    if mode == "none":
        return 0
    model = config.model
    heads = model.num_heads if mode == "full" else max(1, model.num_heads // 8)
    return 2 * model.num_layers * batch * heads * KV_LENGTH * model.head_dim * BF16


def launch_bound_ms(launches: Sequence[Launch], rates: Rates, launch_us: float) -> float:
    """Every launch at the largest of its bytes', its operations' and a launch's least time."""
    return 1e3 * sum(
        max(
            launch.num_bytes / rates.bytes_per_s,
            launch.num_flops / rates.flops_per_s,
            launch_us * 1e-6,
        )
        for launch in launches
    )


def fit_launch_us(launches: Sequence[Launch], rates: Rates, measured_ms: float) -> float:
    """The least time of a launch with which :func:`launch_bound_ms` gives ``measured_ms``."""
    low, high = 0.0, 1e3 * measured_ms
    for _ in range(50):
        middle = (low + high) / 2
        if launch_bound_ms(launches, rates, middle) < measured_ms:
            low = middle
        else:
            high = middle
    return low


@dataclass(frozen=True)
class Step:
    """One decode step, counted.

    Attributes:
        config: of the model.
        batch: sequences.
        kv_mode: what is cached.
        parts: what it must read and multiply.
        launches: what it gives to the device.
    """

    config: Config
    batch: int
    kv_mode: KVMode
    parts: list[Part]
    launches: list[Launch]

    @classmethod
    def of(
        cls,
        config: Config,
        model: LanguageModel,
        batch: int,
        kv_mode: KVMode,
        experts: float | None = None,
    ) -> Step:
        """Count.

        Args:
            config: of the model.
            model: of :func:`build_dry`.
            batch: sequences.
            kv_mode: what is cached.
            experts: distinct ones read per layer; None: as balanced routing has them.
        """
        touched = touched_by(config, batch)
        if experts is not None:
            touched = replace(touched, experts=experts)
        parts = step_parts(config, batch, BF16, kv_bytes(config, batch, kv_mode), touched)
        launches = count_launches(model, batch, kv_mode, touched.experts)
        return cls(config, batch, kv_mode, parts, launches)

    def times(self, launch_us: float) -> dict[str, dict[str, float]]:
        """Per GPU: roofline and launch-bound time."""
        return {
            gpu: {
                "roofline_ms": published(gpu).least_ms(self.parts),
                "launch_bound_ms": launch_bound_ms(self.launches, published(gpu), launch_us),
            }
            for gpu in GPUS
        }

    def row(self, launch_us: float) -> dict[str, Any]:
        """For the document."""
        return {
            "preset": self.config.preset,
            "kind": self.config.model.kind,
            "batch": self.batch,
            "kv_mode": self.kv_mode,
            "launches": len(self.launches),
            "bytes_read": round(sum(part.num_bytes for part in self.parts)),
            "bytes_moved": round(sum(launch.num_bytes for launch in self.launches)),
            "bytes_sparse_paper": paper_bytes(self.config, self.batch, BF16),
            "flops": round(sum(part.num_flops for part in self.parts)),
            "parts": [asdict(part) for part in self.parts],
            "gpus": self.times(launch_us),
        }


@cache
def model_of(name: str) -> LanguageModel:
    """A preset's model, built once."""
    return build_dry(preset(name))


def run_predict(predict: PredictConfig) -> dict[str, Any]:
    """Predict and return ``{"rows": [...], "lookups": [...], "rates": {...}, ...}``."""
    rows = [
        Step.of(preset(name), model_of(name), batch, mode).row(predict.launch_us)
        for mode in predict.kv_modes
        for batch in predict.batches
        for name in FAMILIES[predict.size]
    ]
    rates = {gpu: asdict(published(gpu)) for gpu in GPUS}
    document = {"rows": rows, "lookups": list(_lookups(predict)), "rates": rates}
    return {**document, **header(asdict(predict))}


def _lookups(predict: PredictConfig) -> Iterator[dict[str, Any]]:
    """Every program of the lookup at the shape of ``bench lookup``."""
    for tokens in predict.lookup_tokens:
        shape = LookupShape(tokens=tokens, element_size=predict.table_bytes)
        for part in lookup_programs(shape):
            times = {gpu: 1e3 * published(gpu).least_ms([part]) for gpu in GPUS}
            yield {"tokens": tokens, **asdict(part), "roofline_us": times}


def compare(path: Path) -> dict[str, Any]:
    """A document of ``bench decode --dtype bf16 --device cuda`` beside the launch-bound model.

    Bandwidth and rate are those measured beside each step. The least time of a launch is fitted to
    one row, the dense model's at the smallest batch; the other rows are predictions.

    Raises:
        ValueError: the file is no such document.
    """
    try:
        document = json.loads(path.read_text())
        rows, config = document["rows"], document["config"]
        if config["dtype"] != "bf16" or config["device"] != "cuda":
            raise ValueError("it was not measured in bf16 on a GPU")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--measured {path}: no document of bench decode: {error}") from None
    steps = [
        Step.of(
            preset(row["preset"]),
            model_of(row["preset"]),
            row["batch"],
            row["kv_mode"],
            row["distinct_experts"],
        )
        for row in rows
    ]
    rates = [Rates(row["bandwidth_bytes_per_s"], row["matmul_flops_per_s"]) for row in rows]
    base = min(
        (i for i, row in enumerate(rows) if row["kind"] == "dense"), key=lambda i: rows[i]["batch"]
    )
    launch_us = fit_launch_us(steps[base].launches, rates[base], rows[base]["time_ms"])
    compared = []
    for index, (row, step, rate) in enumerate(zip(rows, steps, rates)):
        predicted_ms = launch_bound_ms(step.launches, rate, launch_us)
        compared.append(
            {
                "preset": row["preset"],
                "kind": row["kind"],
                "batch": row["batch"],
                "kv_mode": row["kv_mode"],
                "launches": len(step.launches),
                "roofline_ms": row["roofline_ms"],
                "launch_bound_ms": predicted_ms,
                "measured_ms": row["time_ms"],
                "measured_over_predicted": row["time_ms"] / predicted_ms,
                "fitted": index == base,
            }
        )
    return {"gpu": document["hardware"]["gpu"], "launch_us": launch_us, "rows": compared}
