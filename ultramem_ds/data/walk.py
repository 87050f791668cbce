"""What lies below an input directory: every entry is found, or skipped for a stated reason.

Links are followed. A directory or file that is reached a second time (a cycle, two links to one
place) is skipped and said; what is there under its own name comes before what a link leads to.
In a hub cache one snapshot is read, that of ``refs/main`` where there are several.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from ultramem_ds.utils.files import read_json


@dataclass(frozen=True)
class Skipped:
    """An entry that is not read.

    Attributes:
        name: path below the input; a directory ends in a slash and stands for all it holds.
        reason: why; entries of one reason are counted together.
        expected: it could not hold input, as ``prepare``'s own output.
    """

    name: str
    reason: str
    expected: bool = False


@dataclass
class Tree:
    """The entries below one directory.

    Attributes:
        files: regular files, by their path below the directory.
        skipped: everything else.
    """

    files: list[PurePath] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


def printable(path: PurePath) -> str:
    """A path as text, bytes that are not UTF-8 escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def walk(root: Path, own: Mapping[Path, str]) -> Tree:
    """All entries below ``root``.

    Args:
        root: a directory.
        own: real paths that are no input, and why.

    Raises:
        ValueError: if a hub cache has several snapshots and nothing says which one to read.
        OSError: if a directory cannot be read.
    """
    return _Walk(root, own).run()


class _Walk:
    """One walk; ``run`` is called once."""

    def __init__(self, root: Path, own: Mapping[Path, str]) -> None:
        self._root = root
        self._own = own
        self._tree = Tree()
        self._reached: dict[str, PurePath] = {}  # real path -> where it was first met
        self._directories = deque([PurePath()])
        self._links: deque[PurePath] = deque()

    def run(self) -> Tree:
        while self._directories or self._links:
            if self._directories:
                self._scan(self._directories.popleft())
            else:
                self._follow(self._links.popleft())
        self._tree.files.sort()
        self._tree.skipped.sort(key=lambda entry: entry.name)
        return self._tree

    def _scan(self, below: PurePath) -> None:
        path = self._root / below
        if not self._first_time(below, directory=True):
            return
        if below.parts and (what := prepared_kind(path)):
            self._skip(below, what, directory=True, expected=True)
            return
        with os.scandir(path) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
        chosen = _snapshot(path)
        names = {entry.name for entry in entries}
        for entry in entries:
            at = below / entry.name
            directory = os.path.isdir(entry)  # which takes a link to itself for none
            if entry.name.startswith("."):
                self._skip(at, "hidden", directory=directory)
            elif directory and {"blobs", "snapshots"} <= names and entry.name in ("blobs", "refs"):
                self._skip_bookkeeping(at)
            elif directory and chosen not in (None, entry.name):
                reason = f"another snapshot of the hub cache than {chosen}"
                self._skip(at, reason, directory=True, expected=True)
            elif entry.is_symlink():
                self._links.append(at)
            elif directory:
                self._directories.append(at)
            else:
                self._file(at, entry.stat().st_mode)

    def _follow(self, below: PurePath) -> None:
        try:
            target = Path(os.path.realpath(self._root / below, strict=True))
        except OSError:
            self._skip(below, "link to nothing")
            return
        if target.is_dir():
            self._directories.append(below)
        else:
            self._file(below, target.stat().st_mode)

    def _file(self, below: PurePath, mode: int) -> None:
        if not stat.S_ISREG(mode):
            self._skip(below, "no regular file (a pipe, socket or device)")
        elif self._first_time(below, directory=False):
            self._tree.files.append(below)

    def _first_time(self, below: PurePath, *, directory: bool) -> bool:
        real = os.path.realpath(self._root / below)
        reason = self._own.get(Path(real)) if below.parts else None
        if reason:
            self._skip(below, reason, directory=directory, expected=True)
            return False
        if real in self._reached:
            before = printable(self._reached[real])
            self._skip(below, f"link to {before}, which is read already", directory=directory)
            return False
        self._reached[real] = below
        return True

    def _skip_bookkeeping(self, below: PurePath) -> None:
        self._skip(below, "bookkeeping of a hub cache", directory=True, expected=True)
        for path in sorted((self._root / below).glob("*.incomplete")):
            self._skip(below / path.name, "unfinished download of a hub cache")

    def _skip(
        self, below: PurePath, reason: str, *, directory: bool = False, expected: bool = False
    ) -> None:
        name = printable(below) + ("/" if directory else "")
        self._tree.skipped.append(Skipped(name, reason, expected))


def _snapshot(path: Path) -> str | None:
    """Which of its directories to read if ``path`` is a hub cache's ``snapshots``."""
    cache = path.parent
    if path.name != "snapshots" or not (cache / "blobs").is_dir():
        return None
    present = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    if len(present) < 2:
        return None
    references = {
        file.relative_to(cache / "refs").as_posix(): file.read_text().strip()
        for file in sorted((cache / "refs").rglob("*"))
        if file.is_file()
    }
    if references.get("main") in present:
        return references["main"]
    named = sorted(set(references.values()) & set(present))
    if len(named) == 1:
        return named[0]
    raise ValueError(
        f"{path} holds {len(present)} snapshots of one dataset ({', '.join(present)}), and no "
        f"refs/main says which one to read; give one as --input, for example {path / present[-1]}"
    )


def prepared_kind(path: Path) -> str | None:
    """What a directory is, if it is an output of ``prepare``; else None."""
    manifest = path / "manifest.json"
    if (path / ".staging").is_dir() and not manifest.is_file():
        return "unfinished output of prepare"
    if not manifest.is_file() or not any(path.glob("**/*.idx")):
        return None
    try:
        value = read_json(manifest)
    except ValueError:
        return None
    ours = isinstance(value, dict) and {"fingerprint", "subsets", "tokenizer"} <= value.keys()
    return "output of prepare" if ours else None
