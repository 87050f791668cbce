"""What the initialisation recipes give, as Markdown tables (docs/initialisation.md).

    python benchmarks/init_report.py recipes      # UltraMem presets: mean score, output variance
    python benchmarks/init_report.py cores        # h and r: output variance of both recipes
    python benchmarks/init_report.py candidates   # one- and two-sided search: recall and time

Presets keep their heads, ranks, cores, expansion, top-m and number of keys; hidden and value width
are reduced to 256 and 128, and the table to its first row (values are drawn, not looked up by id),
because neither enters the quantities measured. Every number is a mean over seeds.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from dataclasses import replace

import torch

from ultramem_ds.config.presets import preset
from ultramem_ds.config.schema import Config, MemoryConfig
from ultramem_ds.model.init import INITIALISERS, init_parameter
from ultramem_ds.model.memory.layer import MemoryLayer
from ultramem_ds.model.memory.lookup import ValueTable
from ultramem_ds.telemetry.report import markdown_table

PRESETS = ("ultramem-151m-x10", "ultramem-151m-x12", "ultramem-680m-x12", "ultramem-1.6b-x12")
NUM_TOKENS = 256


class FreshRows:
    """A lookup that draws every looked-up row anew: a table without memory."""

    def __init__(self, config: Config, seed: int) -> None:
        self.memory = config.memory
        self.std = INITIALISERS["table"](config).std
        self.generator = torch.Generator().manual_seed(seed)

    def start(self, rows_TK, projectors_TK, scores_TKh):
        memory = self.memory
        width = memory.value_dim // memory.num_cores
        shape = (*scores_TKh.shape, width)
        rows = torch.randn(shape, generator=self.generator) * self.std
        weighted_TKV = (rows * scores_TKh[..., None]).flatten(2)
        pooled = torch.zeros(len(rows_TK), memory.expansion, memory.value_dim)
        index = projectors_TK[..., None].expand_as(weighted_TKV)
        self.pooled = pooled.scatter_add_(1, index, weighted_TKV)
        return self

    def wait(self):
        return self.pooled


def reduced(name: str, **memory) -> Config:
    config = preset(name)
    model = replace(config.model, hidden_size=256, num_heads=4, dropout=0.0)
    return replace(config, model=model, memory=replace(config.memory, value_dim=128, **memory))


def build(config: Config, seed: int) -> MemoryLayer:
    layer = MemoryLayer(config.model, config.memory, ValueTable(1, config.memory.value_dim, 0))
    for name, param in layer.named_parameters():
        init_parameter(name, param, config, seed)
    layer.lookup = FreshRows(config, seed)
    return layer.eval()


@torch.no_grad()
def measure(config: Config, seeds: int) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation over seeds of what Appendix A wants to be 1."""
    found: dict[str, list[float]] = {"score": [], "square": [], "variance": [], "recall": []}
    for seed in range(seeds):
        layer = build(config, seed)
        x = torch.randn(1, NUM_TOKENS, 256, generator=torch.Generator().manual_seed(seed))
        pending = layer.start(x)
        scores = pending.selection.scores_TKh
        found["score"].append(float(scores.sum(-1).mean()))
        found["square"].append(float(scores.square().mean()))
        output = layer.finish(pending)
        found["variance"].append(float(output.var()) * 2 * config.model.num_layers)
        found["recall"].append(float(layer.retrieval(x[:, :8], recall_tokens=8).diagnosis.recall))
    return {key: (statistics.mean(v), statistics.stdev(v)) for key, v in found.items()}


def cell(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.3f} ± {pair[1]:.3f}"


def recipes(seeds: int) -> None:
    rows = []
    for name in PRESETS:
        for recipe in ("paper", "corrected"):
            found = measure(reduced(name, init=recipe), seeds)
            rows.append([name, recipe, *(cell(found[k]) for k in ("score", "square", "variance"))])
    header = ["preset", "recipe", "mean top-m score", "mean square of a core's score"]
    print(markdown_table([*header, "output variance * 2L"], rows))


def cores(seeds: int) -> None:
    rows = []
    for rank, num in ((1, 1), (2, 1), (2, 2), (2, 4), (2, 8), (3, 2), (4, 2)):
        change = dict(tucker_rank=rank, num_cores=num)
        pairs = [
            measure(reduced("ultramem-151m-x12", init=recipe, **change), seeds)
            for recipe in ("paper", "corrected")
        ]
        cells = [cell(found[key]) for key in ("score", "variance") for found in pairs]
        rows.append([str(rank), str(num), *cells])
    header = ["rank r", "cores h", "score, paper", "score, corrected", "variance * 2L, paper"]
    print(markdown_table([*header, "variance * 2L, corrected"], rows))


def candidates(seeds: int) -> None:
    rows = []
    for name in ("ultramem-151m-x12", "ultramem-1.6b-x12"):  # two-sided wants an even top-m
        for mode in ("one-sided", "two-sided", "two-sided-full"):
            config = reduced(name, init="corrected", candidates=mode)
            recall = measure(config, seeds)["recall"]
            rows.append([name, mode, cell(recall), f"{search_ms(config.memory, config):.1f}"])
    print(
        markdown_table(
            ["preset", "candidates", "recall", "best of 15 retrievals of 256 tokens, ms"], rows
        )
    )


@torch.no_grad()
def search_ms(memory: MemoryConfig, config: Config) -> float:
    layer = build(config, 0)
    x = torch.randn(1, NUM_TOKENS, 256)
    times = []
    for _ in range(15):
        begin = time.perf_counter()
        layer.retrieval(x)
        times.append(time.perf_counter() - begin)
    return 1e3 * min(times)  # of a shared machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["recipes", "cores", "candidates"])
    parser.add_argument("--seeds", type=int, default=8)
    args = parser.parse_args()
    hardware = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{args.what}: {args.seeds} seeds, {NUM_TOKENS} tokens; {hardware}\n")
    {"recipes": recipes, "cores": cores, "candidates": candidates}[args.what](args.seeds)


if __name__ == "__main__":
    main()
