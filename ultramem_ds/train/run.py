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
from ultramem_ds.config.schema import Config
from ultramem_ds.data.mixture import Mixture
from ultramem_ds.data.same_tokenizer import data_tokenizer, require_same
from ultramem_ds.data.skips import Range, SkipRanges
from ultramem_ds.kernels.registry import resolve
from ultramem_ds.planning.batches import plan_batches
from ultramem_ds.planning.experts import expert_layout
from ultramem_ds.planning.planner import resolve_partition
from ultramem_ds.telemetry.peak_flops import peak_from_environment
from ultramem_ds.train.going_on import changes_since, check_changes
from ultramem_ds.train.init_from import Origin, check_origin, check_started_from, open_origin
from ultramem_ds.zero.deepspeed_import import check_engine_config


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
        extend: ``--extend``: go on under settings that were changed on purpose.
        origin: where a fresh run takes its weights from; None initialises them.
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
    extend: bool = False
    origin: Origin | None = None


def prepare_run(
    config: Config,
    data_dir: Path,
    run_dir: Path,
    deepspeed_file: Path | None,
    world_size: int,
    skip_samples: Sequence[Range] = (),
    *,
    extend: bool = False,
    init_from: Path | None = None,
) -> Run:
    """Check configuration, data, tokenizer, DeepSpeed JSON and world size against each other.

    Args:
        config: resolved configuration.
        data_dir: prepared data.
        run_dir: where the run lives.
        deepspeed_file: DeepSpeed JSON; None takes the kind's own.
        world_size: ranks.
        skip_samples: what to jump over.
        extend: see :class:`Run`.
        init_from: a run or an exported model whose weights a fresh run starts from.

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
    origin = open_origin(init_from) if init_from is not None else None
    if origin is not None:
        check_origin(origin, config, data_dir, tokenizer)
    resume_from = checkpoints.newest_readable(run_dir)
    if resume_from is not None:
        require_same(run_dir, tokenizer, data_dir)
        if origin is not None:
            check_started_from(run_dir, origin)
        state = checkpoints.read_trainer_state(resume_from)
        changes = changes_since(resume_from, state, config, mixture.fingerprint)
        check_changes(resume_from, state, changes, extend)
        skips_of(skip_samples, state)
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
        extend,
        origin,
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
