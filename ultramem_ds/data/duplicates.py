"""Exact duplicates among all documents of a preparation, by their 64-bit content hash.

Memory is flat: hashes are first distributed over bucket files by their leading bits, then each
bucket is sorted on its own. Two different texts share a hash with probability 2^-64: 0.03
expected pairs among 10^9 documents.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ultramem_ds.data.units import Group

BUCKET_DOCUMENTS = 1 << 22  # documents sorted at once, about 200 MB
_ENTRY = np.dtype([("hash", "<u8"), ("document", "<u8"), ("group", "u1")])

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class HashFile:
    """Hashes of the documents of one group in one unit."""

    group: Group
    path: Path
    documents: int


@dataclass(frozen=True)
class Duplicates:
    """What was found.

    ``repeats`` counts, per group, documents whose text occurred before in the same group;
    ``shared``, for every set of two or more groups, texts that occur in exactly these groups.
    """

    documents: int
    duplicates: int  # documents whose text occurred before, anywhere
    repeats: dict[Group, int]
    shared: dict[tuple[Group, ...], int]

    @property
    def leaks(self) -> int:
        """Texts that occur in training and in a validation split (of a held-out corpus)."""
        return sum(
            texts
            for groups, texts in self.shared.items()
            if {split for split, _ in groups} == {"train", "validation"}
        )

    def to_json(self, *, dropped: bool) -> dict[str, Any]:
        """Plain form for the manifest; groups are written ``split/subset``."""
        return {
            "documents": self.documents,
            "duplicates": self.duplicates,
            "dropped": self.duplicates if dropped else 0,
            "texts_in_train_and_validation": self.leaks,
            "repeats": {"/".join(group): count for group, count in self.repeats.items()},
            "shared": [
                {"groups": ["/".join(group) for group in groups], "texts": texts}
                for groups, texts in self.shared.items()
            ],
        }


def find_duplicates(
    files: Sequence[HashFile],
    scratch: Path,
    keep: BoolArray | None = None,
    bucket_documents: int = BUCKET_DOCUMENTS,
) -> Duplicates:
    """Count exact duplicates over all ``files``.

    Args:
        files: in order of precedence: of equal documents the first one is the original. Files of
            one group follow each other.
        scratch: directory for bucket files, made and removed here.
        keep: if given, one entry per document in the order of ``files``; set to False for every
            document that is no original, True for the others.
        bucket_documents: documents to sort at once.
    """
    groups = sorted({file.group for file in files})
    assert len(groups) <= 64, "group sets are 64-bit masks"
    total = sum(file.documents for file in files)
    bits = max(0, (-(-total // bucket_documents) - 1).bit_length())
    repeats = dict.fromkeys(groups, 0)
    if keep is not None:
        keep[:] = True
    duplicates = 0
    shared: Counter[int] = Counter()
    try:
        for entries in _buckets(files, groups, scratch, bits):
            if not len(entries):
                continue
            order = np.argsort(entries["hash"], kind="stable")
            entries = entries[order]
            first = np.ones(len(entries), dtype=np.bool_)
            first[1:] = entries["hash"][1:] != entries["hash"][:-1]
            duplicates += int((~first).sum())
            if keep is not None:
                keep[entries["document"][~first]] = False
            masks = np.bitwise_or.reduceat(
                np.uint64(1) << entries["group"].astype(np.uint64), np.flatnonzero(first)
            )
            shared.update(_counted(masks[np.bitwise_count(masks) > 1]))
            again = ~first[1:] & (entries["group"][1:] == entries["group"][:-1])
            for number, count in _counted(entries["group"][1:][again]).items():
                repeats[groups[number]] += count
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    named = {
        tuple(group for number, group in enumerate(groups) if mask >> number & 1): texts
        for mask, texts in sorted(shared.items())
    }
    return Duplicates(total, duplicates, repeats, named)


def _counted(values: npt.NDArray[Any]) -> dict[int, int]:
    distinct, counts = np.unique(values, return_counts=True)
    return dict(zip(distinct.tolist(), counts.tolist()))


def _entries(files: Sequence[HashFile], groups: Sequence[Group]) -> Iterator[npt.NDArray[Any]]:
    """Entries of one file after the other, documents numbered through."""
    document = 0
    for file in files:
        hashes = np.fromfile(file.path, dtype="<u8")
        assert len(hashes) == file.documents, file
        entries = np.empty(len(hashes), dtype=_ENTRY)
        entries["hash"] = hashes
        entries["document"] = np.arange(document, document + len(hashes))
        entries["group"] = groups.index(file.group)
        document += len(hashes)
        yield entries


def _buckets(
    files: Sequence[HashFile], groups: Sequence[Group], scratch: Path, bits: int
) -> Iterator[npt.NDArray[Any]]:
    """All entries, those of equal hash together and in order, in 2^bits portions."""
    if bits == 0:
        yield np.concatenate(list(_entries(files, groups)))
        return
    scratch.mkdir(parents=True, exist_ok=True)
    paths = [scratch / f"bucket-{number}" for number in range(1 << bits)]
    with ExitStack() as stack:
        outs = [stack.enter_context(open(path, "wb")) for path in paths]
        for entries in _entries(files, groups):
            numbers = entries["hash"] >> np.uint64(64 - bits)
            order = np.argsort(numbers, kind="stable")
            ends = np.searchsorted(numbers[order], np.arange(1, 1 << bits))
            for out, part in zip(outs, np.split(entries[order], ends)):
                out.write(part.tobytes())
    for path in paths:
        yield np.fromfile(path, dtype=_ENTRY)
        path.unlink()
