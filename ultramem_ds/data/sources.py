"""What there is to read below the inputs, and how it is cut into units of work.

Every entry is found: read, or skipped for a stated reason. Units depend on the inputs alone, never
on workers or shards, and their order fixes the order of the output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from ultramem_ds.data.formats import READ_SUFFIXES, Format, NotData, recognise, stem_of
from ultramem_ds.data.options import ReadOptions
from ultramem_ds.data.subsets import canonical_subset, safe_name, subset_of_file
from ultramem_ds.data.tables import num_hub_shards, num_parquet_shards
from ultramem_ds.data.unit import Unit
from ultramem_ds.data.walk import Skipped, prepared_kind, printable, walk

# Plain files are cut into about _CUTS ranges, each of a size between these two.
_CUTS = 64
_MIN_UNIT_BYTES = 4 << 20
_MAX_UNIT_BYTES = 256 << 20


@dataclass(frozen=True)
class Survey:
    """What the inputs hold.

    Attributes:
        units: what is to be read, in the order of the output.
        skipped: entries below the inputs that are not.
        notes: (file, text) where a file's content is not what its name says.
    """

    units: tuple[Unit, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[tuple[str, str], ...]


def survey(
    inputs: Sequence[str],
    options: ReadOptions | None = None,
    own: Mapping[Path, str] | None = None,
) -> Survey:
    """Look at all inputs: nothing found below them goes unmentioned.

    Args:
        inputs: files; directories, searched recursively; ``SUBSET=PATH`` to name the subset;
            ``hf:OWNER/NAME[:CONFIG[:SPLIT]]`` for a dataset that ``datasets`` can stream.
        options: of reading.
        own: real paths that are no input, and why.

    Raises:
        ValueError: if an input does not exist, holds no readable file, is an output, or a file
            appears twice.
        OSError: if something cannot be read.
    """
    found = _Survey(options or ReadOptions(), own or {})
    for text in inputs:
        found.add(text)
    # Stable: ranges of a file stay in order, and so do files of one name under two inputs.
    units = sorted(found.units, key=lambda unit: (unit.subset, unit.name))
    return Survey(tuple(units), tuple(found.skipped), tuple(found.notes))


class _Survey:
    """A survey in the making."""

    def __init__(self, options: ReadOptions, own: Mapping[Path, str]) -> None:
        self._options = options
        self._own = own
        self._seen: dict[Path, str] = {}
        self.units: list[Unit] = []
        self.skipped: list[Skipped] = []
        self.notes: list[tuple[str, str]] = []

    def add(self, text: str) -> None:
        subset, place = _split_input(text)
        if place.startswith("hf:"):
            self.units += _hub_units(place[3:], subset)
            return
        root = Path(place)
        own = self._own.get(root.resolve())
        if own:
            raise ValueError(f"input {root} is {own}; name something else, or a directory below it")
        if root.is_dir():
            if what := prepared_kind(root):
                raise ValueError(f"input {root} is {what}; `train --data` takes it, if it is done")
            tree = walk(root, self._own)
            files, skipped = tree.files, tree.skipped
        elif root.is_file():
            files, skipped = [PurePath()], []
        else:
            problem = "is neither a file nor a directory" if root.exists() else "does not exist"
            raise ValueError(f"input {root} {problem}")
        before = len(self.units)
        for below in files:
            self._file(text, root, below, subset, skipped)
        if len(self.units) == before:
            by_name = any("suffix" in entry.reason for entry in skipped)
            known = f"; read are {READ_SUFFIXES}" if by_name or not skipped else ""
            raise ValueError(f"input {root} holds no file to read: {summary(skipped)}{known}")
        self.skipped += skipped

    def _file(
        self,
        text: str,
        root: Path,
        below: PurePath,
        subset: str | None,
        skipped: list[Skipped],
    ) -> None:
        file = root / below
        name = printable(below) if below.parts else printable(PurePath(root.name))
        try:
            form = recognise(file, self._options, chosen=not below.parts)
        except NotData as reason:
            skipped.append(Skipped(name, str(reason)))
            return
        resolved = file.resolve()
        if resolved in self._seen:
            raise ValueError(f"{file} is given twice: by {self._seen[resolved]!r} and {text!r}")
        self._seen[resolved] = text
        ranges = form.has_ranges(self._options)
        self.units += _file_units(file, root, name, subset, form, ranges=ranges)
        if form.note:
            self.notes.append((name, form.note))


def summary(skipped: Sequence[Skipped], names: int = 3) -> str:
    """Reasons with counts and the first few names, the most frequent reason first."""
    by_reason: dict[str, list[str]] = {}
    for entry in skipped:
        by_reason.setdefault(entry.reason, []).append(entry.name)
    lines = [
        f"{len(found)} x {reason} ({', '.join(found[:names])}{', ...' * (len(found) > names)})"
        for reason, found in sorted(by_reason.items(), key=lambda item: -len(item[1]))
    ]
    return "; ".join(lines) or "it is empty"


def _split_input(text: str) -> tuple[str | None, str]:
    subset, sep, place = text.partition("=")
    if sep and "/" not in subset and not Path(text).exists():
        return safe_name(subset), place
    return None, text


def _file_units(
    file: Path, root: Path, name: str, subset: str | None, form: Format, *, ranges: bool
) -> list[Unit]:
    status = file.stat()
    absolute_root = root.absolute()
    if root.is_file():
        below, fallback = PurePath(file.name), stem_of(file.name)
        relative = PurePath(absolute_root.parent.name) / below
    else:
        below, fallback = file.relative_to(root), absolute_root.resolve().name
        relative = PurePath(absolute_root.resolve().name) / below
    chosen = subset or subset_of_file(relative, fallback)

    def unit(begin: int, end: int) -> Unit:
        return Unit(
            kind=form.layout,
            path=str(file.absolute()),
            name=name,
            subset=chosen,
            size=status.st_size,
            modified_ns=status.st_mtime_ns,
            begin=begin,
            end=end,
            compression=form.compression,
            encoding=form.encoding,
        )

    if form.layout == "parquet":
        shards = num_parquet_shards(file)
        return [unit(shard, shards) for shard in range(shards)]
    if not ranges:
        return [unit(0, status.st_size)]
    step = min(max(status.st_size // _CUTS, _MIN_UNIT_BYTES), _MAX_UNIT_BYTES)
    return [
        unit(begin, min(begin + step, status.st_size)) for begin in range(0, status.st_size, step)
    ]


def _hub_units(name: str, subset: str | None) -> list[Unit]:
    shards = num_hub_shards(name)
    chosen = (
        subset
        or canonical_subset(name.split("/")[-1])
        or safe_name(name.split(":")[0].split("/")[-1])
    )
    return [
        Unit(
            kind="hub",
            path=name,
            name=name,
            subset=chosen,
            size=0,
            modified_ns=0,
            begin=shard,
            end=shards,
        )
        for shard in range(shards)
    ]
