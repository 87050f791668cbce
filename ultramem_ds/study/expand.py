"""From a study to its trials: one run directory for every row, token budget and seed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultramem_ds.config.load import load_config
from ultramem_ds.config.schema import Config
from ultramem_ds.model.accounting import training_flops_per_token
from ultramem_ds.study.shape import debug_scale
from ultramem_ds.study.spec import PaperLoss, Row, Study


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the table: a row of the study with one choice of its grid."""

    name: str
    preset: str
    overrides: tuple[str, ...]
    group: str
    compare: str  # name of another line; "" = none
    paper: PaperLoss | None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run.

    Attributes:
        overrides: everything the run differs in from its preset.
        run_dir: relative to the study's output directory.
        config: resolved; what the run directory's ``config.json`` must hold.
    """

    line: Line
    seed: int
    steps: int
    overrides: tuple[str, ...]
    run_dir: Path
    config: Config

    @property
    def tokens(self) -> int:
        """Tokens that the run trains on."""
        return self.steps * self.config.train.global_batch_size * self.config.model.seq_len

    @property
    def training_flops(self) -> float:
        """Model FLOPs of the whole run, forward and backward."""
        return float(self.tokens * training_flops_per_token(self.config))


def lines(study: Study) -> list[Line]:
    """The table's lines in order.

    Raises:
        ValueError: if a row is compared with one that is not there.
    """
    found: list[Line] = []
    for row in study.rows:
        for name, overrides in _choices(row):
            compare = row.compare
            if not compare and found and study.compare != "none":
                compare = found[0 if study.compare == "first" else -1].name
            shape = debug_scale(row.preset) if study.shape == "debug" else ()
            found.append(
                Line(
                    name=name,
                    preset=row.preset,
                    overrides=(*shape, *study.overrides, *row.overrides, *overrides),
                    group=row.group or row.name,
                    compare=compare,
                    paper=row.paper,
                )
            )
    names = {line.name for line in found}
    for line in found:
        if line.compare and line.compare not in names:
            raise ValueError(f"row {line.name}: compare={line.compare} is no row of the study")
    return found


def _choices(row: Row) -> Iterator[tuple[str, tuple[str, ...]]]:
    for values in itertools.product(*row.grid.values()):
        chosen = list(zip(row.grid, map(_text, values)))
        label = ",".join([row.name, *(f"{key.split('.')[-1]}={value}" for key, value in chosen)])
        yield label, tuple(f"{key}={value}" for key, value in chosen)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def trials(study: Study, extra: Sequence[str] = ()) -> list[Trial]:
    """Every run of the study: the first seed of all lines comes before the second of any.

    Args:
        study: what to expand.
        extra: overrides of every run, from the command line; they win.

    Raises:
        ValueError: for a preset or override that does not exist, or a budget below one step.
    """
    found = []
    table = lines(study)
    for seed, tokens, line in itertools.product(study.seeds, study.tokens, table):
        base = load_config(line.preset, [*line.overrides, *extra])
        steps = tokens // (base.train.global_batch_size * base.model.seq_len)
        if steps < 1:
            raise ValueError(f"row {line.name}: {tokens:,} tokens are less than one step")
        overrides = (
            *line.overrides,
            *extra,
            f"train.max_steps={steps}",
            f"train.seed={seed}",
        )
        found.append(
            Trial(
                line=line,
                seed=seed,
                steps=steps,
                overrides=overrides,
                run_dir=Path("runs") / f"{line.name}-steps{steps}-seed{seed}",
                config=load_config(line.preset, overrides),
            )
        )
    return found
