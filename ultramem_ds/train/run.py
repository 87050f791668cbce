"""A run before it has a model: everything that can be checked is, against everything else.

``prepare_run`` needs no model and no process group: bad input ends there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ultramem_ds.checkpoint import directory as checkpoints
from ultramem_ds.config.deepspeed import (
    BatchPlan,
    check_stage,
    engine_config,
    load_deepspeed_json,
    zero_stage,
)
from ultramem_ds.config.load import changed_keys, from_dict, to_dict
from ultramem_ds.config.schema import Config
from ultramem_ds.data.mixture import Mixture
from ultramem_ds.data.same_tokenizer import data_tokenizer, require_same
from ultramem_ds.data.skips import Range, SkipRanges
from ultramem_ds.kernels.registry import resolve
from ultramem_ds.planning.batches import plan_batches
from ultramem_ds.planning.experts import expert_layout
from ultramem_ds.planning.planner import resolve_partition
from ultramem_ds.telemetry.peak_flops import peak_from_environment
from ultramem_ds.zero.deepspeed_import import check_engine_config

# On resume these keys may differ; any other changed key is refused by name.
RESUMABLE_KEYS = frozenset(
    {
        "memory.memory_gb_per_s",
        "memory.partition",
        "memory.rates_file",
        "memory.shard_group_size",
        "memory.wire_gb_per_s",
        "train.micro_batch_size",
        "train.save_every",
        "train.stop_at_step",
        "train.task_data",
        "train.tasks",
        "train.tasks_every",
        "train.tasks_limit",
    }
)


@dataclass(frozen=True)
class Run:
    """A checked run, ready for its model.

    Attributes:
        config: resolved configuration.
        data_dir: prepared data.
        run_dir: where the run writes.
        deepspeed_json: contents of the DeepSpeed JSON.
        batches: how the global batch is cut up.
        world_size: ranks.
        resume_from: checkpoint to continue from, None for a fresh run.
        vocab_size: entries of the tokenizer; the model's may be padded beyond.
        mixture: the order of the training data.
        skip_samples: ranges of global samples to jump over, beside those of the checkpoint.
    """

    config: Config
    data_dir: Path
    run_dir: Path
    deepspeed_json: dict[str, Any]
    batches: BatchPlan
    world_size: int
    resume_from: Path | None
    vocab_size: int
    mixture: Mixture
    skip_samples: tuple[Range, ...] = ()


def prepare_run(
    config: Config,
    data_dir: Path,
    run_dir: Path,
    deepspeed_file: Path | None,
    world_size: int,
    skip_samples: Sequence[Range] = (),
) -> Run:
    """Check configuration, data, tokenizer, DeepSpeed JSON and world size against each other.

    Raises:
        ValueError: for the first thing that does not fit, saying what to change.
    """
    deepspeed_json = load_deepspeed_json(deepspeed_file, config.model.kind)
    check_stage(config.model.kind, zero_stage(deepspeed_json))
    if config.model.kind == "moe":
        expert_layout(config, world_size)
    batches = plan_batches(config, world_size)
    check_engine_config(engine_config(deepspeed_json, config, batches))
    tokenizer = data_tokenizer(data_dir)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer of {data_dir} has {tokenizer.vocab_size} entries but "
            f"model.vocab_size={config.model.vocab_size}; set model.vocab_size="
            f"{-(-tokenizer.vocab_size // 128) * 128}"
        )
    _check_lookups(config, world_size)
    peak_from_environment()
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"--run-dir {run_dir} is a file; name a directory")
    mixture = Mixture(
        data_dir,
        "train",
        seq_len=config.model.seq_len,
        weights=config.data.weights,
        seed=config.train.seed,
    )
    resume_from = checkpoints.newest_readable(run_dir)
    if resume_from is not None:
        require_same(run_dir, tokenizer, data_dir)
        _check_data(resume_from, mixture)
        _check_unchanged(resume_from, config)
        skips_of(skip_samples, checkpoints.read_trainer_state(resume_from))
    return Run(
        config,
        data_dir,
        run_dir,
        deepspeed_json,
        batches,
        world_size,
        resume_from,
        tokenizer.vocab_size,
        mixture,
        tuple(skip_samples),
    )


def skips_of(asked: Sequence[Range], state: checkpoints.TrainerState | None) -> SkipRanges:
    """What a run jumps over: ``--skip-samples`` and what its checkpoint jumped over.

    Raises:
        ValueError: a range that is asked for has partly been trained on.
    """
    if state is None:
        return SkipRanges.of(asked)
    recorded = SkipRanges.of(state.skipped_samples)
    return recorded.extended(asked, state.consumed_samples)


def _check_lookups(config: Config, world_size: int) -> None:
    """A partition that cannot be, or a kernel that is not there."""
    if not config.has_memory:
        return
    resolve_partition(config, world_size)
    if config.memory.kernel != "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        resolve(config.memory.kernel, torch.device(device))


def _check_data(checkpoint: Path, mixture: Mixture) -> None:
    old = checkpoints.read_trainer_state(checkpoint).data_fingerprint
    if old and old != mixture.fingerprint:  # none: an imported model, which has seen no data here
        raise ValueError(
            f"{checkpoint} was trained on other data (fingerprint {old[:12]}, here "
            f"{mixture.fingerprint[:12]}); use the same --data or another --run-dir"
        )


def _check_unchanged(checkpoint: Path, config: Config) -> None:
    try:
        old = from_dict(checkpoints.read_trainer_state(checkpoint).config)
    except ValueError as error:
        raise ValueError(
            f"{checkpoint} has a configuration that this program does not know: {error}; use the "
            "version that trained it or another --run-dir"
        ) from None
    changed = [key for key in changed_keys(old, config) if key not in RESUMABLE_KEYS]
    if changed:
        a, b = to_dict(old), to_dict(config)
        key = changed[0]
        section, _, name = key.partition(".")
        before, after = (v[section][name] if name else v[section] for v in (a, b))
        raise ValueError(
            f"{checkpoint} was trained with {key}={before!r}, not {after!r}; resume with the old "
            "value or use another --run-dir"
        )
