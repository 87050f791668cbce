"""Figure 9 of the paper: at which (ranks, value width) the two partition schemes send alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ultramem_ds.config.schema import MemoryConfig
from ultramem_ds.planning.costs import lookup_cost

RANKS = np.unique(np.geomspace(2, 1024, 46).round().astype(int))
WIDTHS = np.unique((np.geomspace(64, 4096, 37) / 8).round().astype(int) * 8)


def byte_ratio(memory: MemoryConfig) -> npt.NDArray[np.float64]:
    """Forward bytes of number-wise over those of dimension-wise, (widths, ranks)."""

    def sent(scheme: str, width: int, ranks: int) -> float:
        wide = replace(memory, value_dim=width)
        cost = lookup_cost(wide, scheme, tokens=2048, ranks=ranks, value_bytes=2)
        return sum(cost.forward.values())

    return np.array(
        [
            [
                sent("number-wise", int(width), int(ranks))
                / sent("dimension-wise", int(width), int(ranks))
                for ranks in RANKS
            ]
            for width in WIDTHS
        ]
    )


def plot_crossover(memory: MemoryConfig, path: Path) -> None:
    """Draw the line of equal bytes of one memory layer; shaded: number-wise sends more.

    The paper's formula has one score and one pooled vector per row; dashed is what the layer's
    cores and expansion make of it.

    Raises:
        ValueError: ``path`` is no PNG.
    """
    if path.suffix != ".png":
        raise ValueError(f"--figure {path} must end in .png")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bf16 = replace(memory, wire_dtype="bf16", dedup=False)
    plain = replace(bf16, expansion=1, num_cores=1)
    figure, axis = plt.subplots(figsize=(6, 4.5), layout="constrained")
    axis.contourf(RANKS, WIDTHS, byte_ratio(plain), levels=[1, np.inf], colors=["C0"], alpha=0.2)
    for shape, style, label in (
        (plain, "-", "the paper's formula"),
        (bf16, "--", f"with E={memory.expansion}, h={memory.num_cores}"),
    ):
        axis.contour(RANKS, WIDTHS, byte_ratio(shape), levels=[1], colors="C0", linestyles=style)
        axis.plot([], [], color="C0", linestyle=style, label=label)
    axis.axhline(memory.value_dim, color="C1", linewidth=1, label=f"value width {memory.value_dim}")
    title = f"number-wise = dimension-wise, {memory.rows_per_token} rows per token"
    axis.set(xscale="log", yscale="log", xlabel="ranks P", ylabel="value width", title=title)
    axis.legend(loc="lower right")
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=110)
    plt.close(figure)
    temporary.replace(path)
