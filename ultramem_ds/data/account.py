"""The account of a preparation: what was found below the inputs, and what became of it.

Every entry is a file that was read or something that was skipped, and every record of a file that
was read is a document or unusable: the sums are in the manifest and at the end of ``prepare``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ultramem_ds.data.merge import FinishedUnit
from ultramem_ds.data.sources import Survey, summary
from ultramem_ds.data.tokenizer_losses import Losses
from ultramem_ds.data.unit import Unit
from ultramem_ds.utils.files import atomic_file

_NAMES = 5  # files named per line; the manifest has them all


@dataclass(frozen=True, kw_only=True)
class Account:
    """What the inputs held.

    ``entries`` = ``read`` + what ``skipped`` and ``not_input`` list.
    """

    entries: int = 0  # files, links and skipped directories found below the inputs
    read: int = 0  # files, or hub datasets
    input_bytes: int = 0  # of the files read, as stored
    documents: int = 0
    text_bytes: int = 0  # UTF-8
    without_documents: Sequence[str] = ()  # files read that hold none
    skipped: Mapping[str, Sequence[str]] = field(default_factory=dict)  # reason -> names
    not_input: Mapping[str, Sequence[str]] = field(default_factory=dict)  # that could hold none
    notes: Sequence[str] = ()  # where content is not what a name says, bytes were ignored
    dropped_characters: Mapping[str, int] = field(default_factory=dict)  # by the tokenizer
    unknown_tokens: int = 0

    @property
    def complaints(self) -> list[str]:
        """What ``--strict`` does not let pass."""
        losses = Losses(Counter(self.dropped_characters), self.unknown_tokens)
        skipped = [f"skipped {line}" for line in _by_reason(self.skipped)]
        empty = [f"no document in {_names(self.without_documents)}"] * bool(self.without_documents)
        return [*skipped, *empty, *self.notes, *losses.describe()]

    def describe(self) -> list[str]:
        """The account in lines."""
        lines = [
            f"{self.entries:,} entries found below the inputs: {self.read:,} files read, "
            f"{self.entries - self.read:,} skipped",
            f"{self.input_bytes:,} bytes read, {self.documents:,} documents, {self.text_bytes:,} "
            "bytes of text",
        ]
        lines += [f"  {line}" for line in self.complaints]
        return lines + [f"  not input: {line}" for line in _by_reason(self.not_input)]

    def to_json(self) -> dict[str, Any]:
        """Plain form for the manifest."""
        return asdict(self)


def account_of(found: Survey, units: Sequence[FinishedUnit]) -> Account:
    """The account of finished units of a survey."""
    documents: Counter[str] = Counter()
    files: dict[str, Unit] = {}
    remarks: dict[str, None] = {}
    losses = Losses()
    text_bytes = 0
    for finished in units:
        unit, unit_summary = finished.unit, finished.summary
        files[unit.path] = unit
        documents[unit.path] += unit_summary.num_documents
        text_bytes += sum(counts.text_bytes for counts in unit_summary.counts.values())
        losses.add(unit_summary.losses)
        remarks |= {f"{unit.name}: {remark}": None for remark in unit_summary.remarks}
    skipped, not_input = _reasons(found, expected=False), _reasons(found, expected=True)
    return Account(
        entries=len(files) + len(found.skipped),
        read=len(files),
        input_bytes=sum(unit.size for unit in files.values()),
        documents=documents.total(),
        text_bytes=text_bytes,
        without_documents=tuple(
            sorted(unit.name for path, unit in files.items() if not documents[path])
        ),
        skipped=skipped,
        not_input=not_input,
        notes=(*(f"{name}: {note}" for name, note in found.notes), *remarks),
        dropped_characters=dict(
            sorted(losses.dropped.items(), key=lambda item: (-item[1], item[0]))
        ),
        unknown_tokens=losses.unknown_tokens,
    )


def complaints_of(found: Survey) -> list[str]:
    """What ``--strict`` does not let pass, before anything is read."""
    skipped = [entry for entry in found.skipped if not entry.expected]
    return [
        *([f"not read: {summary(skipped)}"] if skipped else []),
        *(f"{n}: {t}" for n, t in found.notes),
    ]


def _reasons(found: Survey, *, expected: bool) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for entry in found.skipped:
        if entry.expected == expected:
            reasons.setdefault(entry.reason, []).append(entry.name)
    return dict(sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0])))


def _by_reason(reasons: Mapping[str, Sequence[str]]) -> list[str]:
    return [f"{len(names):,} x {reason}: {_names(names)}" for reason, names in reasons.items()]


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMES]) + (", ..." if len(names) > _NAMES else "")


def write_bad_records(path: Path, units: Sequence[FinishedUnit]) -> None:
    """One line per bad record (the first ones of each unit): file, offset, reason."""
    lines = [
        json.dumps({"file": unit.unit.name, "offset": offset, "reason": reason}) + "\n"
        for unit in units
        for offset, reason in unit.summary.reports
    ]
    with atomic_file(path) as out:
        out.write("".join(lines).encode())
