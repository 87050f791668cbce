"""``bench lookup``: our lookup against ``embedding_bag`` and eager gathering, both directions.

Ids are uniform over the table and every call takes other ids, so that rows come from memory and
not from a cache. Comparisons are given what flatters them: ``embedding_bag`` gets its bags
arranged by projector and core beforehand, eager gathering does not sort by projector at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ultramem_ds.bench.common import header, time_alternating
from ultramem_ds.kernels import describe, lookup_reduce, row_adam_
from ultramem_ds.kernels.embedding_bag import bags_by_core, group_by_projector
from ultramem_ds.kernels.hugepages import advise_huge_pages

# T tokens, K entries per token, E projectors, R rows, V value width, h cores.

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COLD_BYTES = 128 << 20  # rows of all problems of a variant together: beyond a last-level cache
MAX_PROBLEMS = 1024


@dataclass(frozen=True, kw_only=True)
class LookupBenchConfig:
    """Shapes of DESIGN's layer (1.21M rows of 512 fp32 values: 2.5 GB) and how to measure."""

    tokens: tuple[int, ...] = (1, 64, 2048)
    num_rows: int = 1_210_000
    value_dim: int = 512
    entries: int = 32  # K = top-m times heads
    num_cores: int = 2
    expansion: int = 4
    dtype: str = "fp32"
    device: str = "cpu"
    kernel: str = "auto"
    huge_pages: bool = False  # ask for them for the table and the gradient buffer
    rounds: int = 9
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype}: use one of {sorted(DTYPES)}")
        if not self.tokens or min(self.tokens) < 1:
            raise ValueError(f"tokens={self.tokens}: at least one count, each at least 1")


@dataclass(frozen=True)
class Problem:
    """One call's ids, scores and incoming gradient, with the bags ``embedding_bag`` wants."""

    rows_TK: Tensor
    projectors_TK: Tensor
    scores_TKh: Tensor
    grad_TEV: Tensor
    bag_ids: Tensor
    bag_offsets: Tensor
    bag_weights: Tensor


def run_lookup_bench(config: LookupBenchConfig) -> dict[str, Any]:
    """Measure and return the document ``{"rows": [...], hardware, versions, config, commit}``.

    Rows are ``{variant, tokens, direction, time_ms, low_ms, high_ms, rounds}``; direction is
    ``forward`` or ``backward`` (table and scores).
    """
    bench = LookupBench(config)
    rows: list[dict[str, Any]] = []
    for tokens in config.tokens:
        problems = [bench.problem(tokens) for _ in range(bench.num_problems(tokens))]
        for direction, variants in (
            ("forward", bench.forward_variants(problems)),
            ("backward", bench.backward_variants(problems)),
        ):
            timings = time_alternating(
                variants, rounds=config.rounds, synchronize=bench.synchronize
            )
            rows += [
                {"variant": name, "tokens": tokens, "direction": direction, **timing.as_row()}
                for name, timing in timings.items()
            ]
    kernel = describe(config.kernel, config.device)
    return {"rows": rows, **header({**asdict(config), "kernel_used": kernel})}


class LookupBench:
    """The table, its gradient buffer and the variants on them."""

    def __init__(self, config: LookupBenchConfig) -> None:
        self.config = config
        self.generator = torch.Generator(config.device).manual_seed(config.seed)
        shape = (config.num_rows, config.value_dim)
        self.values_RV = torch.empty(shape, dtype=DTYPES[config.dtype], device=config.device)
        self.grad_RV = torch.empty(shape, device=config.device)
        if config.huge_pages:
            advise_huge_pages(self.values_RV)
            advise_huge_pages(self.grad_RV)
        self.values_RV.uniform_(-1.0, 1.0, generator=self.generator)
        self.grad_RV.zero_()
        # What embedding_bag reads; a leaf, for a sparse gradient does not pass through a view.
        chunks = self.values_RV.view(-1, config.value_dim // config.num_cores)
        self.chunks = chunks.detach().requires_grad_()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.config.device != "cpu":
            torch.cuda.synchronize()

    def num_problems(self, tokens: int) -> int:
        """Return how many problems keep their rows out of the caches."""
        row_bytes = self.config.value_dim * self.values_RV.element_size()
        needed = -(-COLD_BYTES // (tokens * self.config.entries * row_bytes))
        return min(MAX_PROBLEMS, max(2, needed))

    def problem(self, tokens: int) -> Problem:
        """Draw one problem."""
        config, generator, device = self.config, self.generator, self.config.device
        shape = (tokens, config.entries)
        rows_TK = torch.randint(0, config.num_rows, shape, generator=generator, device=device)
        projectors_TK = torch.randint(
            0, config.expansion, shape, generator=generator, device=device
        )
        scores_TKh = torch.rand(*shape, config.num_cores, generator=generator, device=device)
        grouped = group_by_projector(rows_TK, projectors_TK, scores_TKh, config.expansion)
        ids, offsets, weights = bags_by_core(*grouped)
        grad_TEV = torch.rand(
            tokens, config.expansion, config.value_dim, generator=generator, device=device
        )
        return Problem(
            rows_TK,
            projectors_TK,
            scores_TKh.requires_grad_(),
            grad_TEV.to(self.values_RV.dtype),
            ids,
            offsets,
            weights.to(self.values_RV.dtype).requires_grad_(),
        )

    def lookup(self, p: Problem, kernel: str, grad_values_RV: Tensor | None = None) -> Tensor:
        """Run ours, ``(T, E, V)``."""
        return lookup_reduce(
            self.values_RV,
            p.rows_TK,
            p.projectors_TK,
            p.scores_TKh,
            self.config.expansion,
            grad_values_RV=grad_values_RV,
            kernel=kernel,
        )

    def embedding_bag(self, p: Problem, sparse: bool) -> Tensor:
        """Run torch's kernel on bags arranged beforehand, ``(T * E * h, C)``."""
        return F.embedding_bag(
            p.bag_ids,
            self.chunks,
            p.bag_offsets,
            mode="sum",
            sparse=sparse,
            per_sample_weights=p.bag_weights,
            include_last_offset=True,
        )

    def eager_gather(self, p: Problem) -> Tensor:
        """Pool a token's rows without regard to projectors: less work than asked for."""
        gathered_TKhC = self.values_RV[p.rows_TK].unflatten(2, (self.config.num_cores, -1))
        return (gathered_TKhC * p.scores_TKh[..., None]).sum(1)

    def forward_variants(self, problems: list[Problem]) -> dict[str, Callable[[], object]]:
        """Return a call per variant that takes the next problem, without gradients."""
        kernel = self.config.kernel
        runs: dict[str, Callable[[Problem], Tensor]] = {
            "lookup_reduce": lambda p: self.lookup(p, kernel),
            "embedding_bag": lambda p: self.embedding_bag(p, sparse=False),
            "embedding-bag-kernel": lambda p: self.lookup(p, "embedding-bag"),
            "eager-gather": self.eager_gather,
        }
        return {name: _without_grad(run, problems) for name, run in runs.items()}

    def backward_variants(self, problems: list[Problem]) -> dict[str, Callable[[], object]]:
        """Return a call per variant of the backward alone, giving gradients of table and scores."""
        adam = (torch.zeros_like(self.grad_RV), torch.zeros_like(self.grad_RV))

        def touched_rows(p: Problem) -> tuple[Tensor, Tensor]:
            """What a row-sparse shard does: the rows as a table of their own, and its gradient."""
            rows_U, local_TK = torch.unique(p.rows_TK, return_inverse=True)
            grad_UV = self.grad_RV.new_zeros(rows_U.numel(), self.config.value_dim)
            with torch.enable_grad():
                pooled_TEV = lookup_reduce(
                    self.values_RV.index_select(0, rows_U),
                    local_TK,
                    p.projectors_TK,
                    p.scores_TKh,
                    self.config.expansion,
                    grad_values_RV=grad_UV,
                    kernel=self.config.kernel,
                )
            torch.autograd.grad(pooled_TEV, p.scores_TKh, p.grad_TEV)
            return rows_U, grad_UV

        def touched_rows_and_adam(p: Problem) -> None:
            rows_U, grad_UV = touched_rows(p)
            row_adam_(
                rows_U, grad_UV, self.values_RV, *adam, step=1, lr=0.0, kernel=self.config.kernel
            )

        for problem in problems:  # first touches of the moments' pages are no part of a step
            touched_rows_and_adam(problem)
        graph_variants = {
            "lookup_reduce": lambda p: (
                self.lookup(p, self.config.kernel, self.grad_RV),
                [p.scores_TKh],
            ),
            "embedding-bag-kernel": lambda p: (
                self.lookup(p, "embedding-bag", self.grad_RV),
                [p.scores_TKh],
            ),
            "sparse-coalesce": lambda p: (
                self.embedding_bag(p, sparse=True),
                [self.chunks, p.bag_weights],
            ),
            "dense-gradient": lambda p: (
                self.embedding_bag(p, sparse=False),
                [self.chunks, p.bag_weights],
            ),
        }
        variants = {name: _backward(make, problems) for name, make in graph_variants.items()}
        # Forward and backward: the row-sparse step has no backward without its gather.
        variants["touched-rows"] = _without_grad(touched_rows, problems)
        variants["touched-rows-adam"] = _without_grad(touched_rows_and_adam, problems)
        return variants


def _without_grad(run: Callable[[Problem], Any], problems: list[Problem]) -> Callable[[], object]:
    following = cycle(problems)

    def call() -> object:
        with torch.no_grad():
            return run(next(following))

    return call


def _backward(
    make: Callable[[Problem], tuple[Tensor, list[Tensor]]], problems: list[Problem]
) -> Callable[[], object]:
    """Return a call of the backward alone: the graphs are built here, once per problem."""

    def graphs() -> Iterator[tuple[Tensor, list[Tensor], Tensor]]:
        for problem in problems:
            pooled, inputs = make(problem)
            yield pooled, inputs, problem.grad_TEV.view_as(pooled)

    following = cycle(list(graphs()))

    def call() -> object:
        pooled, inputs, grad = next(following)
        grads = torch.autograd.grad(pooled, inputs, grad, retain_graph=True)
        return [grad.coalesce() if grad.is_sparse else grad for grad in grads]

    return call
