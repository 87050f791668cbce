"""The run that is to be started: configuration, data, run directory, memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ultramem_ds.checkpoint import directory as checkpoints
from ultramem_ds.config.deepspeed import load_deepspeed_json, zero_stage
from ultramem_ds.config.load import load_config
from ultramem_ds.data.manifest import Split, load_manifest
from ultramem_ds.data.same_tokenizer import data_tokenizer
from ultramem_ds.doctor.finding import Finding
from ultramem_ds.train.dry_run import checkpoint_bytes, dry_run, problems
from ultramem_ds.train.run import prepare_run

SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the user wants to run; every part may be missing."""

    preset: str | None = None
    overrides: Sequence[str] = ()
    data: Path | None = None
    run_dir: Path | None = None
    deepspeed: Path | None = None
    world_size: int = 1

    def disk_bytes(self) -> int:
        """For all checkpoints that are kept, and the next; 0 where the configuration is bad."""
        if self.preset is None:
            return 0
        try:
            config = load_config(self.preset, self.overrides)
            stage = zero_stage(load_deepspeed_json(self.deepspeed, config.model.kind))
        except ValueError:  # a finding of check_inputs
            return 0
        return checkpoint_bytes(config, stage) * ((config.train.keep_last or 1) + 1)


def check_inputs(wanted: Wanted) -> Iterator[Finding]:
    """Everything that ``train`` would refuse, in its own words."""
    for area, check in (
        ("config", _config),
        ("data", _data),
        ("run dir", _run_dir),
        ("plan", _plan),
    ):
        try:
            yield from (Finding(area, "ok", text) for text in check(wanted))
        except (ValueError, OSError) as error:
            yield Finding(area, "fail", str(error), "change what the message names")
            return


def _config(wanted: Wanted) -> Iterator[str]:
    if wanted.preset is not None:
        load_config(wanted.preset, wanted.overrides)
        yield f"preset {wanted.preset} with {len(wanted.overrides)} overrides is valid"


def _data(wanted: Wanted) -> Iterator[str]:
    if wanted.data is not None:
        manifest = load_manifest(wanted.data)
        train, validation = (
            sum(info.tokens for info in manifest.of_split(split).values()) for split in SPLITS
        )
        subsets = ", ".join(manifest.of_split("train"))
        entries = data_tokenizer(wanted.data).vocab_size
        yield (
            f"{wanted.data}: {train:,} tokens to train on ({subsets}), "
            f"{validation:,} to validate on, tokenizer of {entries:,} entries"
        )


def _run_dir(wanted: Wanted) -> Iterator[str]:
    if wanted.run_dir is not None:
        latest = checkpoints.latest_checkpoint(wanted.run_dir)
        if latest is None:
            yield f"{wanted.run_dir} has no checkpoint: a run there starts at step 0"
        else:
            step = checkpoints.read_trainer_state(latest).step
            yield f"{wanted.run_dir} would be resumed from step {step}"


def _plan(wanted: Wanted) -> Iterator[str]:
    if wanted.preset is None or wanted.data is None:
        return
    config = load_config(wanted.preset, wanted.overrides)
    run_dir = wanted.run_dir or Path("runs") / config.preset
    found = dry_run(prepare_run(config, wanted.data, run_dir, wanted.deepspeed, wanted.world_size))
    if problems(found):
        raise ValueError(problems(found)[0])
    yield (
        f"{wanted.world_size} ranks x {found['micro_batch_size']} sequences x "
        f"{found['accumulation_steps']} forwards, {found['memory_bytes']['total'] / 1e9:.2f} GB "
        "per rank"
    )
