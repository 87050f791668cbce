"""Text to ``.bin/.idx``: many processes, no central writer, restartable at any moment.

Phases: the inputs are cut into units (``sources``); every process tokenises units of its own into
the staging area (``units``), which is all the parallel work there is; whoever finishes the last
unit concatenates them (``merge``) and writes the manifest. A unit or a merged pair is there
completely or not at all, so a repeated command only does what is missing, and the output is the
same, byte for byte, for any number of workers, shards and interruptions.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ultramem_ds.data.indexed import bin_path, idx_path
from ultramem_ds.data.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Manifest,
    TokenizerInfo,
    load_manifest,
    prefix_of,
    sidecar_path,
)
from ultramem_ds.data.merge import (
    FinishedUnit,
    Part,
    mark_duplicates,
    merge_group,
    merged,
    parts_of,
)
from ultramem_ds.data.readers import DEFAULT_MAX_LINE_BYTES
from ultramem_ds.data.sources import HELD_OUT, Unit, find_units
from ultramem_ds.data.tokenizers import Tokenizer, load_tokenizer
from ultramem_ds.data.units import Group, UnitOptions, UnitSummary, part_path, read_summary
from ultramem_ds.data.workers import run_units
from ultramem_ds.utils.files import TEMPORARY_SUFFIX, atomic_file

logger = logging.getLogger(__name__)

STAGING_DIRECTORY = ".staging"
BAD_RECORDS_NAME = "bad_records.jsonl"
_FREE_BAD_RECORDS = 20  # always tolerated, whatever the share
_WARNINGS = 20  # bad records named on the console; the rest are in BAD_RECORDS_NAME
# Work stops early when even this many times as many records per byte in the rest of the input
# could not bring the share of bad records below the limit.
_HOPE = 10.0


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Options of ``prepare`` beside input, output and tokenizer."""

    workers: int = 1  # processes on this machine
    shard: tuple[int, int] = (0, 1)  # (i, n): this call does units i, i + n, ...
    validation_share: float = 0.005  # of the documents, chosen by content hash
    held_out: tuple[str, ...] = HELD_OUT  # subsets that go to validation whole
    drop_duplicates: bool = False  # keep only the first of equal documents
    text_key: str | None = None  # column of the text; None = text, raw_content or content
    max_bad_share: float = 0.01  # of the records that may be unusable
    max_line_bytes: int = DEFAULT_MAX_LINE_BYTES  # longer lines are bad records
    overwrite: bool = False  # replace a finished directory made from other inputs or options

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers={self.workers} must be at least 1")
        index, count = self.shard
        if not (count >= 1 and 0 <= index <= count):
            raise ValueError(f"shard {index}/{count} must be I/N with 0 <= I <= N and N >= 1")
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"validation share {self.validation_share} must be in [0, 1)")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"maximum share of bad records {self.max_bad_share} must be in [0, 1]")
        if self.max_line_bytes < 1:
            raise ValueError("the longest line must have at least one byte")

    @property
    def unit_options(self) -> UnitOptions:
        """The part that decides the output's content."""
        return UnitOptions(
            validation_share=self.validation_share,
            held_out=tuple(sorted(self.held_out)),
            text_key=self.text_key,
            max_line_bytes=self.max_line_bytes,
        )


class _Preparation:
    """One plan: the units of some inputs under one tokenizer and one set of options."""

    def __init__(
        self, inputs: Sequence[str], output: Path, tokenizer_path: str, config: PrepareConfig
    ) -> None:
        self.inputs = tuple(map(str, inputs))
        self.output = output
        self.config = config
        self.tokenizer_path = tokenizer_path
        self.tokenizer: Tokenizer = load_tokenizer(tokenizer_path)
        self.units = find_units(inputs)
        options = [FORMAT_VERSION, self.tokenizer.hash, asdict(config.unit_options)]
        plan = [[unit.subset, unit.name, unit.size, unit.begin, unit.end] for unit in self.units]
        self.fingerprint = _hash([options, config.drop_duplicates, plan])
        # Units are shared between plans that differ only in their inputs.
        self.staging = output / STAGING_DIRECTORY / _hash(options)[:16]

    def directory(self, unit: Unit) -> Path:
        """Where a unit's parts lie."""
        return self.staging / unit.key

    def finished_manifest(self) -> Manifest | None:
        """The manifest if this very plan is finished; None if nothing or only part is.

        Raises:
            ValueError: if the directory is finished, but from other inputs or options.
        """
        try:
            manifest = load_manifest(self.output)
        except ValueError:
            return None
        if manifest.fingerprint == self.fingerprint:
            return manifest
        if not self.config.overwrite:
            raise ValueError(
                f"{self.output} already holds a dataset made from other inputs, options or another "
                "tokenizer; choose another --output, or --overwrite to replace it"
            )
        (self.output / MANIFEST_NAME).unlink()
        for info in manifest.subsets:
            prefix = prefix_of(self.output, info.group)
            for path in (sidecar_path(prefix), idx_path(prefix), bin_path(prefix)):
                path.unlink(missing_ok=True)
        return None

    def clean_up(self) -> None:
        """Remove the staging area of a finished directory."""
        shutil.rmtree(self.output / STAGING_DIRECTORY, ignore_errors=True)

    def finished(self, unit: Unit) -> UnitSummary | None:
        """Summary of a unit that needs no work any more."""
        directory = self.directory(unit)
        summary = read_summary(directory)
        if summary is None:
            return None
        present = all(
            part_path(directory, group, "tokens").is_file()
            or merged(self.output, group, self.fingerprint)
            for group in summary.counts
        )
        if not present:  # parts were removed by hand
            shutil.rmtree(directory)
            return None
        return summary


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path,
    tokenizer: str | Path,
    config: PrepareConfig | None = None,
) -> Manifest | None:
    """Tokenise ``inputs`` into the directory ``output``; does only what is not done yet.

    Args:
        inputs: files, directories (searched recursively), ``SUBSET=PATH``, or ``hf:OWNER/NAME``.
        output: the directory to fill; created if need be.
        tokenizer: anything :func:`~ultramem_ds.data.tokenizers.load_tokenizer` takes.
        config: see :class:`PrepareConfig`.

    Returns:
        The manifest, or None when other shards have still units to do.

    Raises:
        ValueError: for unusable input, too many bad records, or an output of another plan.
        OSError: if the disk is full or something cannot be accessed. What is finished stays valid.
    """
    config = config or PrepareConfig()
    output = Path(output)
    plan = _Preparation([str(path) for path in inputs], output, str(tokenizer), config)
    output.mkdir(parents=True, exist_ok=True)
    manifest = plan.finished_manifest()
    if manifest is not None:
        logger.info("%s is already prepared", output)
        plan.clean_up()
        return manifest
    plan.staging.mkdir(parents=True, exist_ok=True)
    _run_own_units(plan)
    return _merge_if_finished(plan)


def _run_own_units(plan: _Preparation) -> None:
    index, count = plan.config.shard
    own = [unit for k, unit in enumerate(plan.units) if k % count == index % count]
    summaries = {unit: plan.finished(unit) for unit in own}
    watch = _BadRecordWatch(plan.config, sum(unit.num_bytes for unit in own))
    for unit, summary in summaries.items():
        if summary is not None:
            watch.add(unit, summary)
    todo = [(unit, plan.directory(unit)) for unit, summary in summaries.items() if summary is None]
    if todo:
        jobs = run_units(
            todo, plan.tokenizer_path, plan.config.unit_options, workers=plan.config.workers
        )
        with contextlib.closing(jobs):
            for unit, summary in jobs:
                watch.add(unit, summary)


class _BadRecordWatch:
    """Names bad records as they are found and gives up on hopeless inputs."""

    def __init__(self, config: PrepareConfig, total_bytes: int) -> None:
        self._config = config
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._records = 0
        self._bad: Counter[str] = Counter()
        self._warnings = 0

    def add(self, unit: Unit, summary: UnitSummary) -> None:
        """Count a finished unit.

        Raises:
            ValueError: if the limit on bad records can hardly be kept any more.
        """
        for offset, reason in summary.reports[: _WARNINGS - self._warnings]:
            logger.warning("skipped %s at %d: %s", unit.path, offset, reason)
            self._warnings += 1
        self._done_bytes += unit.num_bytes
        self._records += summary.num_records
        self._bad.update(summary.bad)
        rest = self._total_bytes / max(self._done_bytes, 1) - 1
        hoped = self._records * _HOPE * rest
        check_bad_records(self._bad, self._records, self._config, still_to_come=hoped)


def check_bad_records(
    bad: Counter[str], num_records: int, config: PrepareConfig, *, still_to_come: float = 0.0
) -> None:
    """Raise ValueError if more records are bad than the configuration allows.

    Args:
        bad: bad records by reason.
        num_records: records read.
        config: has the allowed share.
        still_to_come: good records to assume beyond those read.
    """
    num_bad = sum(bad.values())
    if num_bad > max(_FREE_BAD_RECORDS, config.max_bad_share * (num_records + still_to_come)):
        reasons = ", ".join(f"{count} x {reason}" for reason, count in bad.most_common())
        raise ValueError(
            f"{num_bad} of the {num_records} records read are unusable ({reasons}), more than "
            f"{config.max_bad_share:.2%} of all and {_FREE_BAD_RECORDS}. Check the input, or raise "
            "--max-bad-share"
        )


def _merge_if_finished(plan: _Preparation) -> Manifest | None:
    with _merge_lock(plan.staging) as locked:
        if not locked:
            logger.info("another process is merging %s", plan.output)
            return None
        manifest = plan.finished_manifest()  # by another process, while this one waited
        if manifest is not None:
            return manifest
        units = []
        for unit in plan.units:
            summary = plan.finished(unit)
            if summary is None:
                logger.info("this shard is done; others are not, the last one will merge")
                return None
            units.append(FinishedUnit(unit, plan.directory(unit), summary))
        manifest = _merge(plan, units)
    plan.clean_up()
    return manifest


def _merge(plan: _Preparation, units: Sequence[FinishedUnit]) -> Manifest:
    bad: Counter[str] = Counter()
    for unit in units:
        bad.update(unit.summary.bad)
    num_records = sum(unit.summary.num_records for unit in units)
    check_bad_records(bad, num_records, plan.config)
    parts = parts_of(units, plan.config.held_out)
    if not parts:
        raise ValueError(
            f"{' '.join(plan.inputs)}: no document with text in {num_records} records; inputs are "
            ".jsonl, .json.gz, .jsonl.zst or .parquet files with a text column"
        )
    _remove_stale_temporaries(plan.output)
    duplicates, parts = mark_duplicates(
        parts, plan.staging / "duplicates", drop=plan.config.drop_duplicates
    )
    by_group: dict[Group, list[Part]] = {}
    for part in parts:
        if part.keep.any():
            by_group.setdefault(part.group, []).append(part)
    infos = [
        merge_group(plan.output, group, by_group[group], plan.tokenizer, plan.fingerprint)
        for group in sorted(by_group)
    ]
    _write_bad_records(plan.output / BAD_RECORDS_NAME, units)
    plan.tokenizer.save(plan.output)
    manifest = Manifest(
        version=FORMAT_VERSION,
        fingerprint=plan.fingerprint,
        tokenizer=TokenizerInfo(
            file=plan.tokenizer.file_name,
            hash=plan.tokenizer.hash,
            vocab_size=plan.tokenizer.vocab_size,
            eos_id=plan.tokenizer.eos_id,
        ),
        validation_share=plan.config.validation_share,
        subsets=tuple(infos),
        records=num_records,
        bad_records=dict(sorted(bad.items())),
        duplicates=duplicates.to_json(dropped=plan.config.drop_duplicates),
    )
    manifest.save(plan.output)
    return manifest


def _write_bad_records(path: Path, units: Sequence[FinishedUnit]) -> None:
    """One line per bad record (the first ones of each unit): file, offset, reason."""
    lines = [
        json.dumps({"file": unit.unit.name, "offset": offset, "reason": reason}) + "\n"
        for unit in units
        for offset, reason in unit.summary.reports
    ]
    with atomic_file(path) as out:
        out.write("".join(lines).encode())


def _remove_stale_temporaries(output: Path) -> None:
    """Files of merges that were killed; the lock says that no other one runs."""
    for path in output.rglob(f"*{TEMPORARY_SUFFIX}"):
        if STAGING_DIRECTORY not in path.parts:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _merge_lock(staging: Path) -> Iterator[bool]:
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


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
