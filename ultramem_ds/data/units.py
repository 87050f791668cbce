"""Tokenising one unit into its own directory of the staging area.

A finished unit is a directory with, for every (split, subset) it has documents of::

    <split>.<subset>.tokens    ids of all documents, each ending in the end-of-text id
    <split>.<subset>.lengths   int32, tokens per document
    <split>.<subset>.hashes    uint64, content hash per document
    <split>.<subset>.sizes     int32, UTF-8 bytes of text per document
    <split>.<subset>.mask      uint8, 1 for ids that count as targets; of prompts and answers only
    unit.json                  counts, bad records, remarks and losses

It is written under a temporary name, synced and renamed, so that a unit exists only when it is
complete, whatever is killed and however many processes work on it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from ultramem_ds.data.answers import encode_answers
from ultramem_ds.data.indexed import id_dtype
from ultramem_ds.data.options import ReadOptions
from ultramem_ds.data.readers import BadRecord, Document, Record, Remark, read_unit
from ultramem_ds.data.tokenizer_losses import LossCounter, Losses
from ultramem_ds.data.tokenizers import Tokenizer
from ultramem_ds.data.unit import Unit
from ultramem_ds.utils.files import fsync_directory, read_json, temporary_path, write_json

Split: TypeAlias = Literal["train", "validation"]
Group: TypeAlias = tuple[str, str]  # (split, subset)

SUMMARY_NAME = "unit.json"
PARTS = ("tokens", "lengths", "hashes", "sizes")
MASK_PART = "mask"
# A batch ends at either bound: memory stays flat whatever the documents' sizes.
_BATCH_BYTES = 1 << 20
_BATCH_DOCUMENTS = 1024
_BAD_REPORTS_PER_UNIT = 100


@dataclass(frozen=True, kw_only=True)
class UnitOptions:
    """What decides the content of a unit besides its input."""

    validation_share: float
    held_out: tuple[str, ...]  # subsets that go to validation whole
    reading: ReadOptions


@dataclass(kw_only=True)
class Counts:
    """Size of a set of documents."""

    documents: int = 0
    tokens: int = 0  # end-of-text ids included
    text_bytes: int = 0  # UTF-8
    answer_tokens: int = 0  # that count as targets; 0 for plain text, where all do

    def add(self, other: Counts) -> None:
        """Accumulate ``other``."""
        self.documents += other.documents
        self.tokens += other.tokens
        self.text_bytes += other.text_bytes
        self.answer_tokens += other.answer_tokens


@dataclass(kw_only=True)
class UnitSummary:
    """What a finished unit holds."""

    counts: dict[Group, Counts] = field(default_factory=dict)
    bad: Counter[str] = field(default_factory=Counter)  # reason -> records
    reports: list[tuple[int, str]] = field(default_factory=list)  # (offset, reason), the first ones
    remarks: list[str] = field(default_factory=list)  # about the file
    losses: Losses = field(default_factory=Losses)  # characters that the tokenizer lost

    @property
    def num_bad(self) -> int:
        """Bad records of the unit."""
        return sum(self.bad.values())

    @property
    def num_documents(self) -> int:
        """Documents of all groups."""
        return sum(counts.documents for counts in self.counts.values())

    @property
    def num_records(self) -> int:
        """All records of the unit, bad ones included."""
        return self.num_bad + self.num_documents

    def to_json(self) -> dict[str, Any]:
        """Plain form for ``unit.json``."""
        groups = [[*group, asdict(counts)] for group, counts in sorted(self.counts.items())]
        return {
            "groups": groups,
            "bad": dict(self.bad),
            "reports": self.reports,
            "remarks": self.remarks,
            "losses": {
                "dropped": dict(self.losses.dropped),
                "unknown_tokens": self.losses.unknown_tokens,
            },
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> UnitSummary:
        """Inverse of :meth:`to_json`."""
        return cls(
            counts={(split, subset): Counts(**counts) for split, subset, counts in value["groups"]},
            bad=Counter(value["bad"]),
            reports=[(offset, reason) for offset, reason in value["reports"]],
            remarks=value["remarks"],
            losses=Losses(Counter(value["losses"]["dropped"]), value["losses"]["unknown_tokens"]),
        )


def part_path(directory: Path, group: Group, suffix: str) -> Path:
    """File of ``group`` inside a unit's directory; suffix is one of :data:`PARTS` or the mask's."""
    return directory / f"{group[0]}.{group[1]}.{suffix}"


def read_summary(directory: Path) -> UnitSummary | None:
    """Summary of a finished unit, None if the unit is not finished."""
    path = directory / SUMMARY_NAME
    return UnitSummary.from_json(read_json(path)) if path.is_file() else None


def content_hash(data: bytes) -> int:
    """64-bit hash of a document's UTF-8 text; decides its split, equal for equal texts."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def split_of(subset: str, document_hash: int, options: UnitOptions) -> Split:
    """Split of a document: by content alone, so that equal texts always share one.

    Held-out subsets are the exception; what they share with training is reported.
    """
    held_out = subset in options.held_out or document_hash < options.validation_share * 2.0**64
    return "validation" if held_out else "train"


def tokenize_unit(
    unit: Unit,
    tokenizer: Tokenizer,
    options: UnitOptions,
    directory: Path,
    progress: Callable[[Counts], None],
) -> UnitSummary:
    """Tokenise ``unit`` into ``directory``, which appears when everything in it is on disk.

    Args:
        unit: what to read.
        tokenizer: encodes; its end-of-text id is appended to every document.
        options: see :class:`UnitOptions`.
        directory: the unit's directory in the staging area.
        progress: called after every batch with what it added; may raise to stop the work.

    Raises:
        ValueError: if the input is corrupt or changed.
        OSError: if the disk is full or input or output cannot be accessed; names the file.
    """
    temporary = temporary_path(directory)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        summary = _write_parts(unit, tokenizer, options, temporary, progress)
        write_json(temporary / SUMMARY_NAME, summary.to_json())
        fsync_directory(temporary)
        # Another process may have finished the same unit meanwhile; its files are the same.
        with contextlib.suppress(FileExistsError):
            _rename_directory(temporary, directory)
        fsync_directory(directory.parent)
    except OSError as error:
        if error.filename is None:  # a failed write does not say where
            raise OSError(error.errno, error.strerror, str(temporary)) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return summary


def _rename_directory(source: Path, target: Path) -> None:
    try:
        os.rename(source, target)
    except OSError:
        if (target / SUMMARY_NAME).is_file():
            raise FileExistsError(str(target)) from None
        raise


def _write_parts(
    unit: Unit,
    tokenizer: Tokenizer,
    options: UnitOptions,
    directory: Path,
    progress: Callable[[Counts], None],
) -> UnitSummary:
    summary = UnitSummary()
    records = read_unit(unit, options.reading)
    counter = LossCounter(tokenizer)
    dtype = id_dtype(tokenizer.vocab_size)
    masked = options.reading.format != "text"
    with contextlib.ExitStack() as stack:
        parts: dict[Group, _Part] = {}
        for documents in _batches(records, summary):
            hashes = np.array([content_hash(document.data) for document in documents], np.uint64)
            texts = [document.text for document in documents]
            mask = np.empty(0, np.uint8)
            if masked:
                ids, lengths, mask = encode_answers(
                    tokenizer, [document.segments for document in documents], dtype
                )
            else:
                ids, lengths = tokenizer.encode_documents(texts, dtype)
            summary.losses.add(counter.count(texts, ids))
            sizes = np.array([len(document.data) for document in documents], np.int32)
            groups = [
                (split_of(document.subset, int(digest), options), document.subset)
                for document, digest in zip(documents, hashes)
            ]
            for group in dict.fromkeys(groups):
                chosen = np.array([other == group for other in groups])
                if group not in parts:
                    parts[group] = stack.enter_context(_Part(directory, group, masked=masked))
                    summary.counts[group] = Counts()
                of_chosen = np.repeat(chosen, lengths)
                arrays = [ids[of_chosen], lengths[chosen], hashes[chosen], sizes[chosen]]
                parts[group].write(*arrays, *([mask[of_chosen]] if masked else []))
                added = Counts(
                    documents=int(chosen.sum()),
                    tokens=int(lengths[chosen].sum()),
                    text_bytes=int(sizes[chosen].sum()),
                    answer_tokens=int(mask[of_chosen].sum()) if masked else 0,
                )
                summary.counts[group].add(added)
                progress(added)
    return summary


def _batches(records: Iterator[Record], summary: UnitSummary) -> Iterator[list[Document]]:
    """Group documents into batches; bad records are noted in ``summary`` on the way."""
    batch: list[Document] = []
    num_bytes = 0
    for record in records:
        if isinstance(record, Remark):
            summary.remarks.append(record.text)
            continue
        if isinstance(record, BadRecord):
            summary.bad[record.reason] += 1
            if len(summary.reports) < _BAD_REPORTS_PER_UNIT:
                summary.reports.append((record.offset, record.reason))
            continue
        batch.append(record)
        num_bytes += len(record.data)
        if num_bytes >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


class _Part:
    """The growing files of one (split, subset)."""

    def __init__(self, directory: Path, group: Group, *, masked: bool) -> None:
        suffixes = (*PARTS, MASK_PART) if masked else PARTS
        self._paths = [part_path(directory, group, suffix) for suffix in suffixes]
        self._files: list[BinaryIO] = []

    def __enter__(self) -> _Part:
        self._files = [open(path, "wb") for path in self._paths]  # noqa: SIM115 - see __exit__
        return self

    def write(self, *arrays: npt.NDArray[Any]) -> None:
        """Append what :data:`PARTS` names, and the mask if there is one, of some documents."""
        for file, array in zip(self._files, arrays):
            file.write(array.tobytes())

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for file in self._files:
            with file:
                if kind is None:
                    file.flush()
                    os.fsync(file.fileno())
