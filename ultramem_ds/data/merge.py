"""From finished units to ``.bin/.idx`` pairs: concatenation in the units' order."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from ultramem_ds.data.duplicates import BoolArray, Duplicates, HashFile, find_duplicates
from ultramem_ds.data.indexed import IntArray, bin_path, id_dtype, idx_path, mask_path, write_index
from ultramem_ds.data.manifest import (
    SubsetInfo,
    is_complete,
    load_sidecar,
    prefix_of,
    sidecar_path,
)
from ultramem_ds.data.tokenizers import Tokenizer
from ultramem_ds.data.unit import Unit
from ultramem_ds.data.units import MASK_PART, Counts, Group, Split, UnitSummary, part_path
from ultramem_ds.utils.files import atomic_file, write_json

_COPY_TOKENS = 8 << 20  # ids copied at once


@dataclass(frozen=True)
class FinishedUnit:
    """A unit, where its parts lie, and what they hold."""

    unit: Unit
    directory: Path
    summary: UnitSummary


@dataclass(frozen=True)
class Part:
    """Documents of one group in one unit, and which of them are kept."""

    directory: Path
    name: str  # of the source file
    group: Group
    keep: BoolArray  # one entry per document

    def path(self, suffix: str) -> Path:
        """One of the part's files."""
        return part_path(self.directory, self.group, suffix)

    def lengths(self) -> IntArray:
        """Tokens of each kept document."""
        return cast(IntArray, np.fromfile(self.path("lengths"), dtype=np.int32)[self.keep])

    def counts(self) -> Counts:
        """Size of the kept documents, answers apart."""
        sizes = np.fromfile(self.path("sizes"), dtype=np.int32)[self.keep]
        return Counts(
            documents=len(sizes), tokens=int(self.lengths().sum()), text_bytes=int(sizes.sum())
        )

    def of_tokens(self, suffix: str, dtype: npt.DTypeLike) -> Iterator[IntArray]:
        """Elements of the kept documents' tokens (``tokens`` or the mask), in blocks."""
        ids = np.memmap(self.path(suffix), dtype=dtype, mode="r")
        ends = np.cumsum(np.fromfile(self.path("lengths"), dtype=np.int32), dtype=np.int64)
        starts = np.concatenate([[0], ends])
        # Runs of kept documents: a run begins or ends wherever keep changes.
        edges = np.flatnonzero(np.diff(self.keep, prepend=False, append=False))
        for first, last in zip(starts[edges[::2]].tolist(), starts[edges[1::2]].tolist()):
            for begin in range(first, last, _COPY_TOKENS):
                yield ids[begin : min(begin + _COPY_TOKENS, last)]


class _Lengths:
    """Re-iterable blocks of document lengths, one per part: memory stays flat."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[IntArray]:
        return (part.lengths() for part in self._parts)


def parts_of(units: Sequence[FinishedUnit], held_out: Sequence[str]) -> list[Part]:
    """All parts, those of a group together, in the order of precedence among duplicates.

    Held-out subsets come first, so that of equal documents theirs is the original.
    """
    groups = {group for unit in units for group in unit.summary.counts}
    ordered = sorted(groups, key=lambda group: (group[1] not in held_out, group))
    return [
        Part(
            unit.directory,
            unit.unit.name,
            group,
            np.broadcast_to(np.True_, unit.summary.counts[group].documents),
        )
        for group in ordered
        for unit in units
        if group in unit.summary.counts
    ]


def mark_duplicates(
    parts: Sequence[Part], scratch: Path, *, drop: bool
) -> tuple[Duplicates, list[Part]]:
    """Find exact duplicates among all parts.

    Args:
        parts: from :func:`parts_of`.
        scratch: directory for temporary files; one byte per document stays there with ``drop``.
        drop: keep only the first of equal documents.

    Returns:
        What was found, and the parts, marked.
    """
    files = [HashFile(part.group, part.path("hashes"), len(part.keep)) for part in parts]
    if not drop:
        return find_duplicates(files, scratch / "buckets"), list(parts)
    scratch.mkdir(parents=True, exist_ok=True)
    total = sum(file.documents for file in files)
    keep = np.memmap(scratch / "keep", dtype=np.bool_, mode="w+", shape=(total,))
    found = find_duplicates(files, scratch / "buckets", keep)
    ends = np.cumsum([file.documents for file in files])
    marked = [
        Part(part.directory, part.name, part.group, keep[end - len(part.keep) : end])
        for part, end in zip(parts, ends.tolist())
    ]
    return found, marked


@contextlib.contextmanager
def merge_lock(staging: Path) -> Iterator[bool]:
    """Whether this process is the one that may merge; the lock goes with the process."""
    try:
        file = os.open(staging / "merge.lock", os.O_CREAT | os.O_RDWR)
    except FileNotFoundError:  # staging is gone: another process has merged and cleaned up
        staging.mkdir(parents=True, exist_ok=True)
        file = os.open(staging / "merge.lock", os.O_CREAT | os.O_RDWR)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield True
        except BlockingIOError:
            yield False
    finally:
        os.close(file)


def merged(output: Path, group: Group, fingerprint: str) -> SubsetInfo | None:
    """Sidecar of a pair already merged by this very preparation, or None."""
    info = load_sidecar(prefix_of(output, group))
    return info if info and info.fingerprint == fingerprint and is_complete(output, info) else None


def merge_group(
    output: Path, group: Group, parts: Sequence[Part], tokenizer: Tokenizer, fingerprint: str
) -> SubsetInfo:
    """Write the pair and sidecar of ``group``, unless this preparation already did.

    The sidecar is written last and commits the pair; the parts' tokens are deleted after it.

    Args:
        output: the prepared directory.
        group: (split, subset).
        parts: of this group, in order.
        tokenizer: the one the units were made with.
        fingerprint: of the preparation.
    """
    done = merged(output, group, fingerprint)
    if done is None:
        done = _merge(output, group, parts, tokenizer, fingerprint)
    for part in parts:
        for suffix in (MASK_PART, "tokens"):
            part.path(suffix).unlink(missing_ok=True)
    return done


def _merge(
    output: Path, group: Group, parts: Sequence[Part], tokenizer: Tokenizer, fingerprint: str
) -> SubsetInfo:
    prefix = prefix_of(output, group)
    prefix.parent.mkdir(exist_ok=True)
    dtype = id_dtype(tokenizer.vocab_size)
    total = Counts()
    digest = hashlib.sha256()
    for part in parts:
        total.add(part.counts())
    masked = any(part.path(MASK_PART).is_file() for part in parts)
    if masked:
        with atomic_file(mask_path(prefix)) as out:
            for part in parts:
                for block in part.of_tokens(MASK_PART, np.uint8):
                    total.answer_tokens += int(block.sum())
                    out.write(block.data)
    with atomic_file(bin_path(prefix)) as out:
        for part in parts:
            for block in part.of_tokens("tokens", dtype):
                digest.update(block.data)
                out.write(block.data)
    write_index(idx_path(prefix), dtype, total.documents, _Lengths(parts))
    info = SubsetInfo(
        subset=group[1],
        split=cast(Split, group[0]),
        masked=masked,
        **asdict(total),
        dtype=str(dtype),
        sha256=digest.hexdigest(),
        tokenizer_hash=tokenizer.hash,
        eos_id=tokenizer.eos_id,
        source_files=tuple(dict.fromkeys(part.name for part in parts)),
        fingerprint=fingerprint,
    )
    write_json(sidecar_path(prefix), asdict(info))
    return info
