"""Text to ``.bin/.idx``: many processes, no central writer, restartable at any moment.

Phases: the inputs are cut into units (``sources``); every process tokenises units of its own into
the staging area (``units``), which is all the parallel work there is; whoever finishes the last
unit concatenates them (``merge``) and writes the manifest. A unit or a merged pair is there
completely or not at all, so a repeated command only does what is missing, and the output is the
same, byte for byte, for any number of workers, shards and interruptions.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

from ultramem_ds.data.account import Account, account_of, complaints_of, write_bad_records
from ultramem_ds.data.bad_records import STRICT, BadRecordLimit, BadRecordWatch
from ultramem_ds.data.indexed import bin_path, id_dtype, idx_path, mask_path
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
    merge_lock,
    merged,
    parts_of,
)
from ultramem_ds.data.options import ReadOptions
from ultramem_ds.data.readers import Document, read_unit
from ultramem_ds.data.same_tokenizer import data_tokenizer
from ultramem_ds.data.sources import Survey, survey
from ultramem_ds.data.subsets import HELD_OUT
from ultramem_ds.data.tokenizer_files import CLUES
from ultramem_ds.data.tokenizer_losses import LossCounter, changed_by_decoding
from ultramem_ds.data.tokenizers import Tokenizer, load_tokenizer, replace_tokenizer
from ultramem_ds.data.unit import Unit
from ultramem_ds.data.units import Group, UnitOptions, UnitSummary, part_path, read_summary
from ultramem_ds.data.workers import run_units
from ultramem_ds.utils.files import TEMPORARY_SUFFIX

logger = logging.getLogger(__name__)

STAGING_DIRECTORY = ".staging"
BAD_RECORDS_NAME = "bad_records.jsonl"
_SAMPLED_UNITS = 16  # looked at before the work begins, for what the tokenizer loses
_SAMPLED_DOCUMENTS = 8  # of each
_SAMPLED_CHARACTERS = 2000  # of each


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Options of ``prepare`` beside input, output and tokenizer."""

    workers: int = 1  # processes on this machine
    shard: tuple[int, int] = (0, 1)  # (i, n): this call does units i, i + n, ...
    validation_share: float = 0.005  # of the documents, chosen by content hash
    held_out: tuple[str, ...] = HELD_OUT  # subsets that go to validation whole
    drop_duplicates: bool = False  # keep only the first of equal documents
    reading: ReadOptions = field(default_factory=ReadOptions)
    eod_token: str | None = None  # ends every document; None = as the tokenizer's files say
    max_bad_share: float = 0.01  # of the records that may be unusable
    strict: bool = False  # whatever is skipped, ignored or lost is an error
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

    @property
    def bad_record_limit(self) -> BadRecordLimit:
        """How many unusable records are tolerated."""
        return STRICT if self.strict else BadRecordLimit(self.max_bad_share)

    @property
    def unit_options(self) -> UnitOptions:
        """The part that decides the output's content."""
        return UnitOptions(
            validation_share=self.validation_share,
            held_out=tuple(sorted(self.held_out)),
            reading=self.reading,
        )

    def described(self, tokenizer: Tokenizer) -> list[object]:
        """All that decides the content of a unit beside its input, in plain form."""
        reading = self.reading.content
        known: dict[str, object] = {
            "validation_share": self.validation_share,
            "held_out": tuple(sorted(self.held_out)),
            "text_key": self.reading.text_key,
            "max_line_bytes": self.reading.max_line_bytes,
        }
        eos = [tokenizer.eos_id] if tokenizer.end_of_text.source else []
        return [FORMAT_VERSION, tokenizer.hash, reading | known, *eos]


class _Preparation:
    """One plan: the units of some inputs under one tokenizer and one set of options."""

    def __init__(
        self, inputs: Sequence[str], output: Path, tokenizer_path: str, config: PrepareConfig
    ) -> None:
        self.inputs = tuple(map(str, inputs))
        self.output = output
        self.config = config
        self.load_tokenizer = partial(load_tokenizer, tokenizer_path, config.eod_token)
        self.tokenizer: Tokenizer = self.load_tokenizer()
        end = self.tokenizer.end_of_text
        if end.rivals:
            logger.warning(
                "several tokens of the tokenizer could end a document: %r is taken, not %s; "
                "--eod-token chooses",
                end.token,
                " or ".join(map(repr, end.rivals)),
            )
        own = {output.resolve(): "the output directory"}
        if Path(tokenizer_path).is_file():
            own[Path(tokenizer_path).resolve()] = "the tokenizer"
        self.found = survey(inputs, config.reading, own)
        self.units = self.found.units
        options = config.described(self.tokenizer)
        plan = [[unit.subset, unit.name, unit.size, unit.begin, unit.end] for unit in self.units]
        self.fingerprint = hash_of([options, config.drop_duplicates, plan])
        # Units are shared between plans that differ only in their inputs.
        self.staging = output / STAGING_DIRECTORY / hash_of(options)[:16]

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
            for path_of in (sidecar_path, idx_path, mask_path, bin_path):
                path_of(prefix).unlink(missing_ok=True)
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
        ValueError: for unusable input, too many bad records, or an output of another plan; with
            ``config.strict``, for whatever would be skipped or lost.
        OSError: if the disk is full or something cannot be accessed. What is finished stays valid.
    """
    config = config or PrepareConfig()
    output = Path(output)
    plan = _Preparation([str(path) for path in inputs], output, str(tokenizer), config)
    say_skipped(plan.found, strict=config.strict)
    output.mkdir(parents=True, exist_ok=True)
    manifest = plan.finished_manifest()
    if manifest is not None:
        logger.info("%s is already prepared", output)
        _restore_tokenizer(plan)
        if config.strict:
            _be_strict(Account(**manifest.account), Counter(manifest.bad_records))
        plan.clean_up()
        return manifest
    plan.staging.mkdir(parents=True, exist_ok=True)
    _run_own_units(plan)
    return _merge_if_finished(plan)


def _restore_tokenizer(plan: _Preparation) -> None:
    """Put the tokenizer of a finished directory back if it is gone or is another one."""
    try:
        data_tokenizer(plan.output)
    except ValueError as error:
        logger.warning("%s: the tokenizer is put back", error)
        for name in CLUES:
            (plan.output / name).unlink(missing_ok=True)
        replace_tokenizer(plan.tokenizer, plan.output)


def say_skipped(found: Survey, *, strict: bool) -> None:
    """Warn about what will not be read, before the work begins; an error if it must not be."""
    complaints = complaints_of(found)
    if complaints and strict:
        raise ValueError(f"--strict: {'; '.join(complaints)}")
    for complaint in complaints:
        logger.warning("%s", complaint)


def _be_strict(account: Account, bad: Counter[str]) -> None:
    STRICT.check(bad, account.documents + bad.total())
    if account.complaints:
        raise ValueError(f"--strict: {'; '.join(account.complaints)}")


def _try_tokenizer(plan: _Preparation, units: Sequence[Unit]) -> None:
    """Say what the tokenizer loses on the first documents of some units.

    Raises:
        ValueError: if that must not be.
    """
    step = max(1, len(units) // _SAMPLED_UNITS)
    texts = [
        record.text[:_SAMPLED_CHARACTERS]
        for unit in units[::step][:_SAMPLED_UNITS]
        for record in islice(read_unit(unit, plan.config.reading), _SAMPLED_DOCUMENTS)
        if isinstance(record, Document)
    ]
    tokenizer = plan.tokenizer
    ids, _ = tokenizer.encode_documents(texts, id_dtype(tokenizer.vocab_size))
    lost = LossCounter(tokenizer).count(texts, ids).describe()
    if lost and plan.config.strict:
        raise ValueError(f"--strict: in a sample of {len(texts)} documents {'; '.join(lost)}")
    changed = changed_by_decoding(tokenizer, texts)
    if changed and not lost:
        lost = [f"{len(changed)} do not come back from their tokens as they were"]
    for line in lost:
        logger.warning("in a sample of %d documents %s", len(texts), line)


def _run_own_units(plan: _Preparation) -> None:
    index, count = plan.config.shard
    own = [unit for k, unit in enumerate(plan.units) if k % count == index % count]
    summaries = {unit: plan.finished(unit) for unit in own}
    watch = BadRecordWatch(plan.config.bad_record_limit, sum(unit.num_bytes for unit in own))
    for unit, summary in summaries.items():
        if summary is not None:
            watch.add(unit, summary)
    todo = [(unit, plan.directory(unit)) for unit, summary in summaries.items() if summary is None]
    if todo:
        _try_tokenizer(plan, [unit for unit, _ in todo])
        jobs = run_units(
            todo, plan.load_tokenizer, plan.config.unit_options, workers=plan.config.workers
        )
        with contextlib.closing(jobs):
            for unit, summary in jobs:
                watch.add(unit, summary)


def _merge_if_finished(plan: _Preparation) -> Manifest | None:
    with merge_lock(plan.staging) as locked:
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
    plan.config.bad_record_limit.check(bad, num_records)
    account = account_of(plan.found, units)
    if plan.config.strict:
        _be_strict(account, bad)
    parts = parts_of(units, plan.config.held_out)
    if not parts:
        raise ValueError(
            f"{' '.join(plan.inputs)}: no document with text in {num_records} records"
            + "".join(f", {count} x {reason}" for reason, count in bad.most_common(3))
            + "; see --text-key and --format"
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
    write_bad_records(plan.output / BAD_RECORDS_NAME, units)
    replace_tokenizer(plan.tokenizer, plan.output)
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
        account=account.to_json(),
    )
    manifest.save(plan.output)
    return manifest


def _remove_stale_temporaries(output: Path) -> None:
    """Files of merges that were killed; the lock says that no other one runs."""
    for path in output.rglob(f"*{TEMPORARY_SUFFIX}"):
        if STAGING_DIRECTORY not in path.parts:
            path.unlink(missing_ok=True)


def hash_of(value: object) -> str:
    """SHA-256 of a plain value, hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
