"""From finished units to ``.bin/.idx`` pairs: concatenation in the units' order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np

from ultramem_ds.data.atomic import atomic_file, write_json
from ultramem_ds.data.indexed import IntArray, bin_path, id_dtype, idx_path, write_index
from ultramem_ds.data.manifest import (
    SubsetInfo,
    is_complete,
    load_sidecar,
    prefix_of,
    sidecar_path,
)
from ultramem_ds.data.sources import Unit
from ultramem_ds.data.tokenizers import Tokenizer
from ultramem_ds.data.units import Counts, Group, Split, UnitSummary, part_path

_COPY_BYTES = 16 << 20


@dataclass(frozen=True)
class FinishedUnit:
    """A unit, where its parts lie, and what they hold."""

    unit: Unit
    directory: Path
    summary: UnitSummary


class _Lengths:
    """Re-iterable blocks of document lengths, one per unit: memory stays flat."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __iter__(self) -> Iterator[IntArray]:
        return (np.fromfile(path, dtype=np.int32) for path in self._paths)


def merged(output: Path, group: Group, fingerprint: str) -> SubsetInfo | None:
    """Sidecar of a pair already merged by this very preparation, or None."""
    info = load_sidecar(prefix_of(output, group))
    return info if info and info.fingerprint == fingerprint and is_complete(output, info) else None


def merge_group(
    output: Path,
    group: Group,
    units: Sequence[FinishedUnit],
    tokenizer: Tokenizer,
    fingerprint: str,
) -> SubsetInfo:
    """Write the pair and sidecar of ``group``, unless this preparation already did.

    The sidecar is written last and commits the pair; the parts' tokens are deleted after it.

    Args:
        output: the prepared directory.
        group: (split, subset).
        units: finished units in order; those without documents of the group are skipped.
        tokenizer: the one the units were made with.
        fingerprint: of the preparation.
    """
    chosen = [unit for unit in units if group in unit.summary.counts]
    done = merged(output, group, fingerprint)
    if done is None:
        done = _merge(output, group, chosen, tokenizer, fingerprint)
    for unit in chosen:
        part_path(unit.directory, group, "tokens").unlink(missing_ok=True)
    return done


def _merge(
    output: Path,
    group: Group,
    units: Sequence[FinishedUnit],
    tokenizer: Tokenizer,
    fingerprint: str,
) -> SubsetInfo:
    prefix = prefix_of(output, group)
    prefix.parent.mkdir(exist_ok=True)
    total = Counts()
    for unit in units:
        total.add(unit.summary.counts[group])
    digest = hashlib.sha256()
    with atomic_file(bin_path(prefix)) as out:
        for unit in units:
            with open(part_path(unit.directory, group, "tokens"), "rb") as part:
                while block := part.read(_COPY_BYTES):
                    digest.update(block)
                    out.write(block)
    dtype = id_dtype(tokenizer.vocab_size)
    lengths = _Lengths([part_path(unit.directory, group, "lengths") for unit in units])
    write_index(idx_path(prefix), dtype, total.documents, lengths)
    info = SubsetInfo(
        subset=group[1],
        split=cast(Split, group[0]),
        **asdict(total),
        dtype=str(dtype),
        sha256=digest.hexdigest(),
        tokenizer_hash=tokenizer.hash,
        eos_id=tokenizer.eos_id,
        source_files=tuple(dict.fromkeys(unit.unit.name for unit in units)),
        fingerprint=fingerprint,
    )
    write_json(sidecar_path(prefix), asdict(info))
    return info
