"""The first hour with a GPU: every claim about the device, one step after the other.

A step that fails says so and the rest goes on. ``rehearse`` runs on the CPU what has a CPU
equivalent, at debug sizes, so that the command itself is known to work before a GPU is there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ultramem_ds.bench.common import header, time_alternating
from ultramem_ds.bench.decode import DecodeBenchConfig, run_decode_bench
from ultramem_ds.bench.decode_cost import RateProbes
from ultramem_ds.bench.kernel_cost import LookupShape, backward_parts, forward_parts
from ultramem_ds.bench.lookup import LookupBenchConfig, run_lookup_bench
from ultramem_ds.config.load import load_config
from ultramem_ds.doctor.checkout import NoCheckoutError, marked_files, run_marked
from ultramem_ds.doctor.gpu_ranks import check_lookups
from ultramem_ds.infer.cache import DecodeCache
from ultramem_ds.infer.generate import EagerStepper, Stepper
from ultramem_ds.infer.graphs import FixedStep, GraphStepper, can_capture
from ultramem_ds.infer.prepare import prepare_for_decoding
from ultramem_ds.kernels import describe, lookup_reduce, row_adam_
from ultramem_ds.model.init import init_module
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.sharding.execution import make_executor

_CURVES = "test_golden.py"  # its tests marked gpu are a step of their own
KINDS = ("dense", "pkm", "moe", "ultramem")
# fp32 sums in another order, amplified by the steps: a wrong kernel is off by far more.
LOSS_RTOL = 1e-3
# Attention over a masked buffer sums in another order: some roundings of 2^-9 through four blocks.
BF16_LOGITS_RTOL = 5e-2
KERNEL_RTOL = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


class SkippedError(Exception):
    """This machine has not what the step needs; the message says what."""


@dataclass(frozen=True)
class Setting:
    """Where the steps run and how much of it."""

    device: torch.device
    rehearse: bool

    @property
    def train_steps(self) -> int:
        """Optimizer steps of each kind."""
        return 3 if self.rehearse else 50

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Outcome:
    """What one step said.

    Attributes:
        step: its name.
        status: ``skip`` where the machine has not what it needs.
        detail: one line.
        elapsed_s: wall-clock seconds.
    """

    step: str
    status: Literal["ok", "FAIL", "skip"]
    detail: str
    elapsed_s: float

    def line(self) -> str:
        """For people."""
        return f"{self.status:4} {self.step:13} {self.elapsed_s:6.1f} s  {self.detail}"


def environment(setting: Setting) -> str:
    """What there is."""
    if setting.device.type == "cpu":
        return f"torch {torch.__version__}, rehearsal on the CPU; {describe('auto', 'cpu')}"
    properties = torch.cuda.get_device_properties(setting.device)
    return (
        f"{torch.cuda.device_count()} x {properties.name}, {properties.total_memory / 1e9:.0f} GB, "
        f"sm_{properties.major}{properties.minor}, torch {torch.__version__}, "
        f"CUDA {torch.version.cuda}; {describe('auto', 'cuda')}"
    )


def kernels(setting: Setting) -> str:
    """The device's kernel against the reference on the same device: lookups, gradients, Adam."""
    worst = 0.0
    for dtype, rtol in KERNEL_RTOL.items():
        found = [_lookup_and_update(setting.device, dtype, name) for name in ("auto", "reference")]
        for ours, reference in zip(*found):
            scale = float(reference.float().abs().max())
            error = float((ours.float() - reference.float()).abs().max()) / scale
            if not error <= rtol:
                raise AssertionError(f"{dtype}: off by {error:.2g} from the reference")
            worst = max(worst, error / rtol)
    return f"values, gradients and Adam within {worst:.2f} of the tolerances"


def _lookup_and_update(device: torch.device, dtype: torch.dtype, kernel: str) -> list[Tensor]:
    """Pooled values, the table's and the scores' gradients, an Adam step, a hot row among them."""
    generator = torch.Generator().manual_seed(0)
    values_RV = torch.randn(1000, 512, generator=generator).to(device, dtype)
    rows_TK = torch.randint(0, 1000, (64, 32), generator=generator)
    rows_TK[:, 0] = 7
    projectors_TK = torch.randint(0, 4, (64, 32), generator=generator).to(device)
    scores_TKh = torch.randn(64, 32, 2, generator=generator).to(device).requires_grad_()
    grad_RV = torch.zeros(1000, 512, device=device)
    pooled_TEV = lookup_reduce(
        values_RV,
        rows_TK.to(device),
        projectors_TK,
        scores_TKh,
        4,
        grad_values_RV=grad_RV,
        kernel=kernel,
    )
    pooled_TEV.backward(torch.ones_like(pooled_TEV))
    assert scores_TKh.grad is not None
    rows_U = rows_TK.unique().to(device)
    moments = torch.zeros(2, 1000, 512, device=device)
    row_adam_(rows_U, grad_RV[rows_U], values_RV, *moments, step=1, lr=0.1, kernel=kernel)
    return [pooled_TEV.detach(), grad_RV, scores_TKh.grad, values_RV]


def training(setting: Setting) -> str:
    """Every kind's losses on the device against the reference kernel's on the CPU."""
    said = []
    for kind in KINDS:
        ours = _losses(kind, setting.device, "auto", setting.train_steps)
        cpu = _losses(kind, torch.device("cpu"), "reference", setting.train_steps)
        worst = max(abs(a - b) / b for a, b in zip(ours, cpu))
        if not worst <= LOSS_RTOL:
            raise AssertionError(f"{kind}: losses are off by {worst:.2g} from the CPU's")
        said.append(f"{kind} {worst:.1g}")
    return f"{setting.train_steps} steps, largest relative difference: {', '.join(said)}"


def _losses(kind: str, device: torch.device, kernel: str, steps: int) -> list[float]:
    overrides = ["model.dropout=0", "model.seq_len=64", f"memory.kernel={kernel}"]
    config = load_config(f"{kind}-debug", overrides)
    model = LanguageModel(config)
    init_module(model, config, seed=0)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(config.model.vocab_size, (2, 65), generator=generator)
        terms = model(tokens.to(device))
        (terms["loss"] + terms["aux_loss"] + terms["balance_loss"]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # the table's gradient is added to in place
        model.mark_stale()
        losses.append(terms["loss"].item())
    return losses


def decoding(setting: Setting) -> str:
    """Steps over fixed buffers (on a GPU: a CUDA graph) against the model's own forward."""
    said = []
    for kind in KINDS:
        config = load_config(f"{kind}-debug", ["model.dropout=0"])
        model = LanguageModel(config)
        init_module(model, config, seed=0)
        prepare_for_decoding(model.to(setting.device))
        rtol = LOSS_RTOL
        if setting.device.type == "cuda" and not can_capture(model):
            model, rtol = model.to(torch.bfloat16), BF16_LOGITS_RTOL
        with torch.no_grad():
            eager, fixed = (_decode(model, setting, fixed) for fixed in (False, True))
        error = float((eager - fixed).abs().max() / eager.abs().max())
        if not error <= rtol:
            raise AssertionError(f"{kind}: logits of fixed buffers are off by {error:.2g}")
        said.append(f"{kind} {error:.1g}")
    how = "fixed buffers" if setting.device.type == "cpu" else "CUDA graphs"
    return f"{how}, largest relative difference of logits: {', '.join(said)}"


class _FixedStepper:
    """The body of a graph, run as it is."""

    def __init__(self, model: LanguageModel, cache: DecodeCache) -> None:
        for kv in cache.kv:
            assert kv.keys_BACK is not None
            kv.reserve(kv.length + 4, kv.keys_BACK)
        self._step = FixedStep(model, cache)

    def step(self, tokens_B1: Tensor) -> Tensor:
        """Logits ``(B, W)``."""
        self._step.tokens_B1.copy_(tokens_B1)
        return self._step.run()


def _decode(model: LanguageModel, setting: Setting, fixed: bool) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.model.vocab_size, (3, 12), generator=generator)
    tokens = tokens.to(setting.device)
    cache = DecodeCache(model, padding=[0, 2, 5])
    model.logits(tokens[:, :8], state=cache)
    step: Callable[[Tensor], Tensor]
    if not fixed:
        step = EagerStepper(model, cache).step
    elif setting.device.type == "cuda":
        stepper: Stepper = GraphStepper(model, cache)
        step = stepper.step
    else:
        step = _FixedStepper(model, cache).step
    return torch.stack([step(tokens[:, i : i + 1]).clone() for i in range(8, 12)])


def streams(setting: Setting) -> str:
    """Work handed to the asynchronous executor gives the bits of the synchronous one."""
    executor = make_executor(True, setting.device)
    x = torch.randn(256, 256, device=setting.device)
    for _ in range(20):
        job = executor.submit(partial(torch.matmul, x, x))
        filler = x * 2.0  # memory of the current stream, reused meanwhile
        if not torch.equal(job.result(), x @ x):
            raise AssertionError("a result crossed the streams too early")
        x = torch.nn.functional.normalize(filler)
    return f"20 jobs on {type(executor).__name__}"


def lookups(setting: Setting) -> str:
    """``bench lookup`` at the 151M layer's shape, and the share of its roofline."""
    shape: dict[str, Any] = {"num_rows": 20_000, "tokens": (64,), "rounds": 3}
    if not setting.rehearse:
        shape = {"num_rows": 1_210_000, "tokens": (64, 2048), "rounds": 9}
    config = LookupBenchConfig(device=setting.device.type, **shape)
    document = run_lookup_bench(config)
    probes = RateProbes(torch.zeros(1 << (22 if setting.rehearse else 27), device=setting.device))
    timings = time_alternating(probes.calls, rounds=3, synchronize=setting.synchronize)
    rates = probes.rates({name: timing.median_ms for name, timing in timings.items()})
    said = []
    for row in document["rows"]:
        if row["variant"] != "lookup_reduce":
            continue
        lookup = LookupShape(tokens=row["tokens"], num_rows=config.num_rows, element_size=4)
        parts = forward_parts if row["direction"] == "forward" else backward_parts
        share = rates.least_ms(parts(lookup)) / row["time_ms"]
        said.append(
            f"{row['tokens']} tokens {row['direction']} {row['time_ms']:.3g} ms "
            f"({share:.2g} of its roofline)"
        )
    return "; ".join(said)


def decode_rates(setting: Setting) -> str:
    """``bench decode``, and the share of its roofline that each model reaches."""
    said = []
    for size in ("debug",) if setting.rehearse else ("151m", "1.6b"):
        document = run_decode_bench(
            DecodeBenchConfig(
                size=size,
                batches=(1,) if setting.rehearse else (1, 16, 64),
                dtype="fp32" if setting.rehearse else "bf16",
                device=setting.device.type,
                rounds=3,
                sample_s=1e-3 if setting.rehearse else 0.05,
            )
        )
        said += [
            f"{row['preset']} batch {row['batch']} {row['time_ms']:.3g} ms "
            f"({row['roofline_share']:.2f} of its roofline)"
            for row in document["rows"]
        ]
    return "; ".join(said)


def two_devices(setting: Setting) -> str:
    """What needs a second GPU: NCCL lookups of every scheme; rehearsed with gloo."""
    count = 2 if setting.rehearse else torch.cuda.device_count()
    if count < 2:
        raise SkippedError("one device: NCCL wants a GPU per rank")
    return check_lookups(setting.device.type)


def tests(setting: Setting) -> str:
    """The tests marked ``gpu``, but for the recorded curves; a rehearsal only collects them."""
    return _marked(setting, marked_files(but=[_CURVES]))


def golden_curves(setting: Setting) -> str:
    """Training of every kind by the engine, against the recorded curves of two CPU ranks."""
    return _marked(setting, [path for path in marked_files() if path.name == _CURVES])


def _marked(setting: Setting, files: list[Path]) -> str:
    said = run_marked(files, collect_only=setting.rehearse)
    return f"{said}, none run" if setting.rehearse else said


Step: TypeAlias = Callable[[Setting], str]
STEPS: dict[str, Step] = {
    "environment": environment,
    "kernels": kernels,
    "streams": streams,
    "two-devices": two_devices,
    "training": training,
    "decoding": decoding,
    "tests": tests,
    "golden-curves": golden_curves,
    "lookups": lookups,
    "decode-rates": decode_rates,
}


def chosen_steps(names: Sequence[str]) -> dict[str, Step]:
    """Some of ``STEPS``, in their order.

    Raises:
        ValueError: there is no such step.
    """
    unknown = [name for name in names if name not in STEPS]
    if unknown:
        raise ValueError(f"--steps {unknown[0]}: use some of {', '.join(STEPS)}")
    return {name: step for name, step in STEPS.items() if name in names}


def run_steps(rehearse: bool, steps: dict[str, Step] | None = None) -> Iterator[Outcome]:
    """Run all steps, one outcome after the other.

    Raises:
        ValueError: there is no GPU and this is no rehearsal.
    """
    if not rehearse and not torch.cuda.is_available():
        raise ValueError("doctor --gpu: torch sees no CUDA device; --rehearse runs it on the CPU")
    setting = Setting(torch.device("cpu" if rehearse else "cuda"), rehearse)
    torch.backends.cuda.matmul.allow_tf32 = False
    for name, step in (STEPS if steps is None else steps).items():
        begin = time.perf_counter()
        status: Literal["ok", "FAIL", "skip"] = "ok"
        try:
            detail = step(setting)
        except (SkippedError, NoCheckoutError) as reason:
            status, detail = "skip", str(reason)
        except Exception as error:
            status, detail = "FAIL", f"{type(error).__name__}: {error}".splitlines()[0]
        yield Outcome(name, status, detail, time.perf_counter() - begin)


def write_report(outcomes: list[Outcome], directory: Path) -> None:
    """Write ``gpu-check.json`` and ``gpu-check.md``."""
    directory.mkdir(parents=True, exist_ok=True)
    document = {"steps": [asdict(outcome) for outcome in outcomes], **header({})}
    (directory / "gpu-check.json").write_text(json.dumps(document, indent=1) + "\n")
    lines = ["# GPU check", "", "| step | status | seconds | what |", "|---|---|---|---|"]
    lines += [f"| {o.step} | {o.status} | {o.elapsed_s:.1f} | {o.detail} |" for o in outcomes]
    (directory / "gpu-check.md").write_text("\n".join(lines) + "\n")
