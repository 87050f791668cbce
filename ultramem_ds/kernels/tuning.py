"""Makes a GPU's rows of the table of tiles: every program at the paper's shapes, timed.

``python -m ultramem_ds.kernels --tune`` on the GPU in question. A trial is a call that launches
one or more programs; each of them is timed with every one of its settings while the others keep
theirs. Settings that do not fit the GPU are passed over.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import triton

from ultramem_ds.kernels import tiles
from ultramem_ds.kernels.finding import RowFinder
from ultramem_ds.kernels.row_adam import AdamStep
from ultramem_ds.kernels.tiles import Row, Settings
from ultramem_ds.kernels.triton import TritonAtomicKernel, TritonKernel

# Letters: see kernels/base.py and kernels/finding.py.

Measure = Callable[[Callable[[], object]], float]

_WIDE = {"TILE_V": (128, 256, 512, 1024), "num_warps": (1, 2, 4, 8), "num_stages": (1, 3)}
CHOICES: dict[str, Mapping[str, Sequence[int]]] = {
    "pool_rectangular_program": _WIDE,
    "pool_ragged_program": _WIDE,
    "entry_dots_program": _WIDE,
    "row_runs_program": _WIDE,
    "join_runs_program": _WIDE,
    "row_backward_atomic_program": _WIDE,
    "row_adam_program": _WIDE,
    "convolve_project_program": {
        "TILE_O": (16, 32, 64), "TILE_D": (32, 64, 128), "num_warps": (2, 4, 8),
        "num_stages": (2, 3),
    },
    "search_program": {
        "TILE_N": (32, 64, 128), "TILE_D": (32, 64, 128), "num_warps": (2, 4, 8),
        "num_stages": (2, 3),
    },
    "select_program": {
        "CHUNK": (512, 1024, 2048), "TILE_D": (32, 64, 128), "num_warps": (2, 4, 8),
        "num_stages": (1, 3),
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A memory layer's shape, and tokens of a call.

    Attributes: as of ``config.memory`` and ``config.model``.
    """

    hidden_size: int
    num_keys: int
    kdim: int
    value_dim: int
    top_m: int
    num_heads: int
    rank: int  # r; 1: product keys, a query per head, no convolution, no norm
    expansion: int
    tokens: int
    num_rows: int = 1 << 18  # of the table that is read: far beyond a cache


# The 151M and 1.6B models of the paper (Table 2), with one row and with a batch.
PAPER = tuple(
    Layer(**shape, tokens=tokens)
    for shape in (
        dict(hidden_size=1024, num_keys=2200, kdim=256, value_dim=512, top_m=16, num_heads=2,
             rank=2, expansion=4),
        dict(hidden_size=2048, num_keys=3584, kdim=448, value_dim=1024, top_m=42, num_heads=2,
             rank=2, expansion=4),
        dict(hidden_size=1024, num_keys=1347, kdim=512, value_dim=1024, top_m=16, num_heads=6,
             rank=1, expansion=1),
        dict(hidden_size=2048, num_keys=3077, kdim=896, value_dim=2048, top_m=42, num_heads=12,
             rank=1, expansion=1),
    )
    for tokens in (1, 64)
)  # fmt: skip


def find_rows_call(layer: Layer, device: torch.device) -> Callable[[], object]:
    """A decode step's retrieval with random weights in bf16."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16().to(device)

    tucker = layer.rank > 1
    heads, num_keys, rank, width = layer.num_heads, layer.num_keys, layer.rank, layer.kdim
    num_queries = 2 if tucker else 2 * heads
    side_2 = torch.arange(2).view(2, 1, 1).expand(2, heads, rank)
    head_H = torch.arange(heads).view(1, heads, 1).expand(2, heads, rank)
    finder = RowFinder(
        conv_kD=random(4, layer.hidden_size) if tucker else None,
        proj_OD=random(num_queries * width, layer.hidden_size) / layer.hidden_size**0.5,
        norm="layernorm" if tucker else "none",
        norm_d=random(width) if tucker else None,
        eps=1e-5,
        groups_2Hr=(side_2 if tucker else 2 * head_H + side_2).contiguous().to(device),
        keys_2Hnrd=random(2, heads, num_keys, rank, width),
        search_2Hnsd=random(2, heads, num_keys, 1, width),
        core_hHrr=random(2, heads, rank, rank).float() if tucker else None,
        top_m=layer.top_m,
        softmax=not tucker,
        rounds=torch.randint(num_keys, (4, num_keys), generator=generator).to(device),
        permutation=None,
        num_rows=max(1, num_keys * num_keys // layer.expansion),
    )
    x_TD = random(layer.tokens, layer.hidden_size)
    state_TCD = random(layer.tokens, 3, layer.hidden_size) if tucker else None
    return partial(TritonKernel().find_rows, finder, x_TD, state_TCD, None)


def lookup_calls(layer: Layer, device: torch.device) -> Iterator[Callable[[], object]]:
    """The lookup's forwards and backwards and the rows' Adam, bf16 values, on random rows."""
    generator = torch.Generator().manual_seed(0)
    num_cores = 2 if layer.rank > 1 else 1
    shape_TK = (layer.tokens, layer.top_m * layer.num_heads)
    num_entries = layer.tokens * shape_TK[1]
    values_RV = torch.empty(layer.num_rows, layer.value_dim, dtype=torch.bfloat16, device=device)
    values_RV.normal_()
    rows_TK = torch.randint(layer.num_rows, shape_TK, generator=generator).to(device)
    projectors_TK = torch.randint(layer.expansion, shape_TK, generator=generator).to(device)
    scores_TKh = torch.rand(*shape_TK, num_cores, generator=generator).to(device)
    yield partial(
        TritonKernel().lookup, values_RV, rows_TK, projectors_TK, scores_TKh, layer.expansion
    )
    rows_M, scores_Mh = rows_TK.flatten(), scores_TKh.flatten(0, 1)
    offsets = torch.arange(0, num_entries + 1, shape_TK[1], device=device)
    yield partial(TritonKernel().bags, values_RV, rows_M, offsets, scores_Mh)
    grad_BV = torch.ones(layer.tokens, layer.value_dim, dtype=torch.bfloat16, device=device)
    bags_M = torch.arange(num_entries, device=device) // shape_TK[1]
    buffer_RV = torch.zeros_like(values_RV, dtype=torch.float32)
    for kernel in (TritonKernel(), TritonAtomicKernel()):
        yield partial(kernel.backward, grad_BV, values_RV, rows_M, bags_M, scores_Mh, buffer_RV)
    rows_U = torch.arange(min(num_entries, layer.num_rows), device=device)
    moments = torch.zeros_like(buffer_RV), torch.zeros_like(buffer_RV)
    step = AdamStep.at(1, lr=0.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, grad_scale=1.0)
    grad_UV = buffer_RV[rows_U]
    yield partial(TritonKernel().row_adam_, rows_U, grad_UV, values_RV, *moments, step)


def calls(layers: Sequence[Layer], device: torch.device) -> Iterator[Callable[[], object]]:
    """Every program at these shapes."""
    for layer in layers:
        yield find_rows_call(layer, device)
        yield from lookup_calls(layer, device)


def measured_ms(call: Callable[[], object]) -> float:
    """Median time of a call, on a GPU; elsewhere of one call, which says nothing of a GPU."""
    if torch.cuda.is_available():
        return float(triton.testing.do_bench(call, return_mode="median"))
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


def tune(
    trials: Iterator[Callable[[], object]],
    gpu: str,
    choices: Mapping[str, Mapping[str, Sequence[int]]] = CHOICES,
    measure: Measure = measured_ms,
) -> list[Row]:
    """The fastest settings of every program at every shape that the trials launch.

    Args:
        trials: calls that launch programs.
        gpu: the table's name of it.
        choices: what is tried of each program; the first of equally fast ones is kept.
        measure: milliseconds of a call.
    """
    best: dict[tuple[str, str], Row] = {}
    for call in trials:
        with tiles.noting() as asked:
            call()
        for program, shape in asked.items():
            if (program, shape) not in best:
                found = _fastest(call, program, choices[program], measure)
                best[program, shape] = Row(program, gpu, shape, found)
    return list(best.values())


def _fastest(
    call: Callable[[], object],
    program: str,
    choices: Mapping[str, Sequence[int]],
    measure: Measure,
) -> Settings:
    times: list[tuple[float, Settings]] = []
    for sizes in itertools.product(*choices.values()):
        settings = dict(zip(choices, sizes))
        try:
            with tiles.forced(program, settings):
                call()  # compiles
                times.append((measure(call), settings))
        except triton.runtime.errors.OutOfResources:
            continue
    return min(times, key=lambda timed: timed[0])[1]


def joined(table: Sequence[Row], tuned: Sequence[Row]) -> list[Row]:
    """``table`` with a GPU's new rows before those of any, its old rows of these shapes gone."""
    made = {(row.program, row.gpu, row.shape) for row in tuned}
    kept = [row for row in table if (row.program, row.gpu, row.shape) not in made]
    own = [row for row in kept if row.gpu != tiles.ANY]
    return [*own, *tuned, *(row for row in kept if row.gpu == tiles.ANY)]


def main(out: Path) -> None:
    """Tune on this machine's GPU and write the table to ``out``.

    Raises:
        ValueError: there is none.
    """
    if not torch.cuda.is_available():
        raise ValueError("--tune times kernels on a GPU, and there is none here")
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = tiles.gpu_name(device)
    rows = tune(calls(PAPER, device), gpu)
    tiles.write(joined(tiles.read(), rows), out)
    print(f"{out}: {len(rows)} rows of {gpu}")
