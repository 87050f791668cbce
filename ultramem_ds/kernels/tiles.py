"""Tile sizes of the Triton programs by GPU and shape: a small table, ``tiles.json``.

A row names a program, a GPU (``sm_90``; ``*`` any) and a shape (a pattern over words such as
``T1 d256 m16``, each a size rounded up to a power of two), and gives tile sizes, warps and
stages. The first row that fits is taken, a GPU's own before those of any. A tile is never larger
than what it covers. ``python -m ultramem_ds.kernels --tune`` makes the rows of a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch

_LOGGER = logging.getLogger(__name__)

PATH = Path(__file__).with_name("tiles.json")
ANY = "*"
Settings = dict[str, int]


@dataclass(frozen=True)
class Row:
    """One line of the table; see the module."""

    program: str
    gpu: str
    shape: str
    settings: Settings

    def fits(self, program: str, gpu: str, shape: str) -> bool:
        """Whether this row is about that program and shape on that GPU."""
        return self.program == program and self.gpu == gpu and fnmatchcase(shape, self.shape)


def power_of_two(size: int, least: int = 1) -> int:
    """The power of two from ``size`` up, at least ``least``."""
    return 1 << (max(size, least) - 1).bit_length()


def read(path: Path = PATH) -> list[Row]:
    """The table's rows, in order.

    Raises:
        TypeError, ValueError: it is no such table.
    """
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


def write(rows: list[Row], path: Path) -> None:
    """Write a table, a row a line."""
    lines = ",\n".join(f"  {json.dumps(asdict(row))}" for row in rows)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


_table = functools.cache(read)
_forced: dict[str, Settings] = {}


@contextlib.contextmanager
def forced(program: str, settings: Settings) -> Iterator[None]:
    """Take these settings for ``program``, whatever the table says: for tuning."""
    _forced[program] = settings
    try:
        yield
    finally:
        del _forced[program]


_noted: dict[str, str] | None = None


@contextlib.contextmanager
def noting() -> Iterator[dict[str, str]]:
    """The programs that ask meanwhile, and at which shape."""
    global _noted
    noted: dict[str, str] = {}
    _noted = noted
    try:
        yield noted
    finally:
        _noted = None


def settings(program: str, shape: str, gpu: str) -> Settings:
    """What the table says of a program, see :class:`Row`.

    Raises:
        LookupError: nothing, not even for any GPU.
    """
    if _noted is not None:
        _noted[program] = shape
    if program in _forced:
        return _forced[program]
    return _look_up(program, shape, gpu)


@functools.cache
def _look_up(program: str, shape: str, gpu: str) -> Settings:
    for wanted in (gpu, ANY):
        for row in _table():
            if row.fits(program, wanted, shape):
                if wanted == ANY:
                    _say_untuned(gpu)
                return row.settings
    raise LookupError(f"no tiles for {program} at {shape}")


@functools.cache
def _say_untuned(gpu: str) -> None:
    _LOGGER.debug("tiles of the Triton kernels are not tuned for every shape on %s", gpu)


@functools.cache
def gpu_name(device: torch.device) -> str:
    """The table's name of a device: ``sm_90``, ``gfx942``; ``interpreter`` where there is none."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
