"""A study as a file: what is compared, at which seeds and token budgets.

A study is YAML (or JSON, which is YAML). ``ultramem_ds/study/files`` holds the shipped ones;
docs/study.md explains the keys.
"""

from __future__ import annotations

import difflib
from dataclasses import field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

Figure: TypeAlias = Literal["curves", "compute", "sparsity", "state", "subsets"]

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class PaperLoss:
    """What the paper prints for a row, nats per token."""

    train: float | None = None
    valid: float | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Row:
    """One line of the table, or with ``grid`` one line per combination of its values."""

    name: str  # letters, digits, '.', '-', '_'
    preset: str  # of `count`
    overrides: tuple[str, ...] = ()  # section.key=value
    grid: dict[str, tuple[str | int | float | bool, ...]] = field(default_factory=dict)
    group: str = ""  # line of a figure that the row is a point of; "" = its name
    compare: str = ""  # row to take the difference from; "" = the study's rule
    paper: PaperLoss | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Study:
    """A whole study.

    Attributes:
        shape: ``debug`` brings paper-sized presets to debug scale (``study/shape.py``).
    """

    title: str
    question: str  # one sentence
    rows: tuple[Row, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    tokens: tuple[int, ...]  # budgets per run, tokens; each is a schedule of its own
    overrides: tuple[str, ...] = ()  # of every row, before its own
    compare: Literal["first", "previous", "none"] = "first"
    shape: Literal["preset", "debug"] = "preset"
    figures: tuple[Figure, ...] = ("curves",)

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        for name in names:
            if not name or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
                raise ValueError(f"row {name!r}: a name has letters, digits, '.', '-' and '_'")
            if names.count(name) > 1:
                raise ValueError(f"row {name!r} is there twice")
        for what, values in (("rows", self.rows), ("seeds", self.seeds), ("tokens", self.tokens)):
            if not values or len(set(map(str, values))) < len(values):
                raise ValueError(f"{what} must not be empty nor name one thing twice")
        if min(self.tokens) < 1 or min(self.seeds) < 0:
            raise ValueError("tokens must be positive, seeds not negative")


_ADAPTER: TypeAdapter[Study] = TypeAdapter(Study)


def shipped() -> tuple[str, ...]:
    """Names of the studies that come with the package."""
    files = resources.files("ultramem_ds.study") / "files"
    return tuple(sorted(f.name.removesuffix(".yaml") for f in files.iterdir()))


def load_study(name: str) -> tuple[str, Study]:
    """Read a study.

    Args:
        name: a file, or one of :func:`shipped`.

    Returns:
        Its short name (the file's without suffix) and the study.

    Raises:
        ValueError: for an unknown name, text that is no YAML, or a key or value that does not fit.
    """
    path = Path(name)
    if path.is_file():
        text, short = path.read_text(encoding="utf-8", errors="replace"), path.stem
    elif name in shipped():
        text = (resources.files("ultramem_ds.study") / "files" / f"{name}.yaml").read_text()
        short = name
    else:
        nearest = difflib.get_close_matches(name, shipped(), n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{name!r} is no file and no shipped study: did you mean {nearest!r}? `study --list` "
            "names them all"
        )
    try:
        values: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from None
    try:
        return short, _ADAPTER.validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        message = str(first["msg"]).removeprefix("Value error, ")
        raise ValueError(f"{name}: {where + ': ' if where else ''}{message}") from None
