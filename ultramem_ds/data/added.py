"""Held-out subsets that join a finished directory; nothing else in it is touched.

Training data is compared with them by token ids: the texts are gone, but one tokenizer made all
the ids, so that equal texts are equal ids.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ultramem_ds.data.account import account_of, complaints_of
from ultramem_ds.data.bad_records import BadRecordWatch
from ultramem_ds.data.indexed import IndexedDataset
from ultramem_ds.data.manifest import Manifest, SubsetInfo, load_manifest, prefix_of
from ultramem_ds.data.merge import FinishedUnit, Part, merge_group, merge_lock
from ultramem_ds.data.prepare import STAGING_DIRECTORY, PrepareConfig, hash_of, say_skipped
from ultramem_ds.data.same_tokenizer import data_tokenizer, require_same
from ultramem_ds.data.sources import Survey, survey
from ultramem_ds.data.subsets import safe_name
from ultramem_ds.data.tokenizers import load_tokenizer
from ultramem_ds.data.units import Group, UnitOptions, read_summary
from ultramem_ds.data.workers import run_units


def add_validation(
    output: str | Path,
    addition: str,
    config: PrepareConfig | None = None,
    *,
    tokenizer_path: str | None = None,
) -> Manifest:
    """Tokenise ``NAME=PATH`` into the held-out subset NAME of a finished directory.

    Args:
        output: the directory.
        addition: the subset's name and any input of ``prepare``.
        config: reading, workers, tolerance of bad records, ``overwrite`` (of an earlier addition).
        tokenizer_path: checked against the directory's own, which is used.

    Returns:
        The new manifest. Repeating an addition changes nothing.

    Raises:
        ValueError: for a directory that is not finished, unusable input, or a name that is taken.
        OSError: if the disk is full or something cannot be accessed.
    """
    output, config = Path(output), config or PrepareConfig()
    name, sep, place = addition.partition("=")
    if not sep or not place or safe_name(name) != name:
        raise ValueError(f"--add-validation {addition}: it takes NAME=PATH, as in c4=/data/c4")
    manifest = load_manifest(output)
    tokenizer = data_tokenizer(output)
    if tokenizer_path is not None:
        require_same(output, load_tokenizer(tokenizer_path, config.eod_token), tokenizer_path)
    found = _survey(place, name, output, config)
    plan = [[unit.name, unit.size, unit.begin, unit.end] for unit in found.units]
    fingerprint = hash_of([tokenizer.hash, tokenizer.eos_id, config.reading.content, name, plan])
    if _is_there(manifest, name, fingerprint, output, overwrite=config.overwrite):
        return manifest
    staging = output / STAGING_DIRECTORY / f"added-{fingerprint[:16]}"
    staging.mkdir(parents=True, exist_ok=True)
    with merge_lock(staging) as locked:
        if not locked:
            raise ValueError(f"another process is adding to {output}")
        # Nothing is split off, so that all documents of a unit lie in its "train" groups.
        options = UnitOptions(validation_share=0.0, held_out=(), reading=config.reading)
        jobs = [(unit, staging / unit.key) for unit in found.units]
        watch = BadRecordWatch(config.bad_record_limit, sum(unit.num_bytes for unit, _ in jobs))
        todo = [(unit, directory) for unit, directory in jobs if read_summary(directory) is None]
        load = partial(load_tokenizer, output)
        if todo:
            with closing(run_units(todo, load, options, workers=config.workers)) as finished:
                for unit, unit_summary in finished:
                    watch.add(unit, unit_summary)
        units = [
            FinishedUnit(unit, directory, summary)
            for unit, directory in jobs
            if (summary := read_summary(directory)) is not None
        ]
        group: Group = ("validation", name)
        info = merge_group(output, group, _parts(units), tokenizer, fingerprint)
        manifest = _joined(output, manifest, info, found, units, config)
        manifest.save(output)
    shutil.rmtree(output / STAGING_DIRECTORY, ignore_errors=True)
    return manifest


def _survey(place: str, name: str, output: Path, config: PrepareConfig) -> Survey:
    found = survey([place], config.reading, {output.resolve(): "the output directory"})
    say_skipped(found, strict=config.strict)
    units = tuple(replace(unit, subset=name) for unit in found.units)
    return replace(found, units=units)


def _is_there(
    manifest: Manifest, name: str, fingerprint: str, output: Path, *, overwrite: bool
) -> bool:
    """Whether this very addition is finished; refuses to replace anything else."""
    present = manifest.of_split("validation").get(name)
    if present is None:
        return False
    if present.fingerprint == fingerprint:
        return True
    where = prefix_of(output, present.group)
    if name not in manifest.added:
        raise ValueError(
            f"{where} was split off the training data; give the added subset another name, for "
            f"example {name}_validation=..."
        )
    if not overwrite:
        raise ValueError(f"{where} was added from other files; --overwrite replaces it")
    return False


def _parts(units: Sequence[FinishedUnit]) -> list[Part]:
    """All documents of the units, whatever subset a record named."""
    parts = [
        Part(unit.directory, unit.unit.name, group, np.ones(counts.documents, np.bool_))
        for unit in units
        for group, counts in sorted(unit.summary.counts.items())
    ]
    if not parts:
        raise ValueError("no document with text in what --add-validation names")
    return parts


def _joined(
    output: Path,
    manifest: Manifest,
    info: SubsetInfo,
    found: Survey,
    units: Sequence[FinishedUnit],
    config: PrepareConfig,
) -> Manifest:
    bad: Counter[str] = Counter()
    for unit in units:
        bad.update(unit.summary.bad)
    config.bad_record_limit.check(bad, sum(unit.summary.num_records for unit in units))
    others = [other for other in manifest.subsets if other.group != info.group]
    account = account_of(found, units)
    entry = {
        "account": account.to_json(),
        "bad_records": dict(sorted(bad.items())),
        "shared": _shared(output, info, others),
    }
    if config.strict and (account.complaints or complaints_of(found)):
        raise ValueError(f"--strict: {'; '.join(account.complaints or complaints_of(found))}")
    return replace(
        manifest,
        subsets=tuple(sorted((*others, info), key=lambda each: each.group)),
        added={**manifest.added, info.subset: entry},
    )


def _shared(output: Path, info: SubsetInfo, others: Sequence[SubsetInfo]) -> list[dict[str, Any]]:
    """For each other pair, how many distinct texts of the added one it holds too."""
    own = set(_digests(output, info))
    shared = []
    for other in others:
        common = own.intersection(_digests(output, other))
        if common:
            groups = ["/".join(info.group), "/".join(other.group)]
            shared.append({"groups": groups, "texts": len(common)})
    return shared


def _digests(output: Path, info: SubsetInfo) -> Iterator[bytes]:
    """One per document, equal for equal ids; the end-of-text id is left out."""
    for ids in IndexedDataset(prefix_of(output, info.group)):
        kept = ids[:-1] if len(ids) and int(ids[-1]) == info.eos_id else ids
        yield hashlib.blake2b(kept.astype("<u4").tobytes(), digest_size=16).digest()
