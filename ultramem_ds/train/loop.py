"""The training run: check everything that can be checked, resume, step, validate, save.

``prepare_run`` needs no model and no process group: bad input ends there. ``train`` is the loop.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ultramem_ds.config.deepspeed import (
    BatchPlan,
    check_stage,
    engine_config,
    load_deepspeed_json,
    plan_batches,
    zero_stage,
)
from ultramem_ds.config.load import changed_keys, from_dict, to_dict
from ultramem_ds.config.schema import Config
from ultramem_ds.data.loader import BatchLoader
from ultramem_ds.data.manifest import load_manifest
from ultramem_ds.data.mixture import Mixture
from ultramem_ds.data.tokenizers import load_tokenizer
from ultramem_ds.sharding.comm import Comm
from ultramem_ds.sharding.deepspeed_import import check_engine_config
from ultramem_ds.sharding.experts import expert_parallel_size
from ultramem_ds.sharding.runtime import Ranks, runtime
from ultramem_ds.train import checkpoint as checkpoints
from ultramem_ds.train.engine import StepResult, TrainEngine
from ultramem_ds.train.evaluate import Reader, SubsetLoss, evaluate
from ultramem_ds.train.memory_use import peak_memory_bytes
from ultramem_ds.train.metrics import MetricsWriter
from ultramem_ds.train.phases import Phases
from ultramem_ds.train.signals import StopRequest
from ultramem_ds.utils.files import write_json

# On resume these keys may differ; any other changed key is refused by name.
RESUMABLE_KEYS = frozenset(
    {
        "memory.partition",
        "memory.shard_group_size",
        "train.micro_batch_size",
        "train.save_every",
        "train.stop_at_step",
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
    """

    config: Config
    data_dir: Path
    run_dir: Path
    deepspeed_json: dict[str, Any]
    batches: BatchPlan
    world_size: int
    resume_from: Path | None
    vocab_size: int


def prepare_run(
    config: Config, data_dir: Path, run_dir: Path, deepspeed_file: Path | None, world_size: int
) -> Run:
    """Check configuration, data, tokenizer, DeepSpeed JSON and world size against each other.

    Raises:
        ValueError: for the first thing that does not fit, saying what to change.
    """
    deepspeed_json = load_deepspeed_json(deepspeed_file, config.model.kind)
    check_stage(config.model.kind, zero_stage(deepspeed_json))
    if config.model.kind == "moe":
        expert_parallel_size(config, world_size)
    batches = plan_batches(config, world_size)
    check_engine_config(engine_config(deepspeed_json, config, batches))
    load_manifest(data_dir)
    tokenizer = load_tokenizer(data_dir)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer of {data_dir} has {tokenizer.vocab_size} entries but "
            f"model.vocab_size={config.model.vocab_size}; set model.vocab_size="
            f"{-(-tokenizer.vocab_size // 128) * 128}"
        )
    resume_from = checkpoints.newest_readable(run_dir)
    if resume_from is not None:
        _check_unchanged(resume_from, config)
    return Run(
        config,
        data_dir,
        run_dir,
        deepspeed_json,
        batches,
        world_size,
        resume_from,
        tokenizer.vocab_size,
    )


def _check_unchanged(checkpoint: Path, config: Config) -> None:
    old = from_dict(checkpoints.read_trainer_state(checkpoint).config)
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


def train(run: Run) -> dict[str, Any]:
    """Train to ``train.max_steps`` (or ``train.stop_at_step``); returns the run's summary.

    Returns:
        ``{step, val_loss, tokens_per_s, peak_memory_bytes, ...}``, the same on every rank.
    """
    config = run.config
    done_step = 0
    if run.resume_from is not None:
        done_step = checkpoints.read_trainer_state(run.resume_from).step
    last_step = config.train.max_steps
    if config.train.stop_at_step:
        last_step = min(last_step, config.train.stop_at_step)
    stop = StopRequest()
    with stop.listening(), runtime() as ranks:
        if ranks.is_main:
            _prepare_run_dir(run)
        Comm().barrier()
        mixture = Mixture(
            run.data_dir,
            "train",
            seq_len=config.model.seq_len,
            weights=config.data.weights,
            seed=config.train.seed,
        )
        if run.resume_from is not None:
            _check_data(run.resume_from, mixture)
        if done_step >= last_step:
            if ranks.is_main:
                print(f"{run.run_dir} is finished: step {done_step} of {last_step}", flush=True)
            return {"step": done_step}
        engine = TrainEngine(config, ranks, run.deepspeed_json, run.batches, Phases(), stop)
        if run.resume_from is not None:
            done_step = engine.load_last_good(run.run_dir).step
            if ranks.is_main:
                print(f"resuming {run.run_dir} from step {done_step}", flush=True)
        return _Loop(run, ranks, engine, mixture, done_step, last_step).run_to_end()


def _prepare_run_dir(run: Run) -> None:
    checkpoints.checkpoints_dir(run.run_dir).mkdir(parents=True, exist_ok=True)
    write_json(run.run_dir / "config.json", to_dict(run.config))
    write_json(run.run_dir / "deepspeed.json", run.deepspeed_json)
    load_tokenizer(run.data_dir).save(run.run_dir)


def _check_data(checkpoint: Path, mixture: Mixture) -> None:
    old = checkpoints.read_trainer_state(checkpoint).data_fingerprint
    if old != mixture.fingerprint:
        raise ValueError(
            f"{checkpoint} was trained on other data (fingerprint {old[:12]}, here "
            f"{mixture.fingerprint[:12]}); use the same --data or another --run-dir"
        )


class _Loop:
    """State of one call of :func:`train`: where it is and what it writes."""

    def __init__(
        self,
        run: Run,
        ranks: Ranks,
        engine: TrainEngine,
        mixture: Mixture,
        done_step: int,
        last_step: int,
    ) -> None:
        self.run = run
        self.config = run.config
        self.ranks = ranks
        self.engine = engine
        self.mixture = mixture
        self.done_step = done_step
        self.last_step = last_step
        self.tokens_per_step = run.config.train.global_batch_size * run.config.model.seq_len
        self.step_times_s: list[float] = []
        self.val_loss: float | None = None

    def run_to_end(self) -> dict[str, Any]:
        train = self.config.train
        writer = MetricsWriter(self.run.run_dir, self.done_step + 1) if self.ranks.is_main else None
        loader = BatchLoader(
            self.mixture,
            global_batch_size=train.global_batch_size,
            micro_batch_size=self.run.batches.micro_batch_size,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            start_step=self.done_step,
            num_workers=self.config.data.num_workers,
            prefetch=self.config.data.prefetch,
            document_mask=self.config.data.document_mask,
            reset_positions=self.config.data.reset_positions,
        )
        try:
            micro_batches = iter(loader)
            for step in range(self.done_step, self.last_step):
                self.engine.phases.step = step + 1
                begin = time.perf_counter()
                result = self.engine.train_step(micro_batches, step)
                self.step_times_s.append(time.perf_counter() - begin)
                self._after_step(step + 1, result, writer)
                if self.engine.stopping:
                    break
        finally:
            loader.close()
            if writer is not None:
                writer.close()
        if self.engine.stopping and step + 1 < self.last_step:
            return self._stopped(step + 1)
        return self._summary()

    def _after_step(self, step: int, result: StepResult, writer: MetricsWriter | None) -> None:
        train = self.config.train
        last = step == self.last_step
        if writer is not None:
            writer.write_step(self._record(step, result))
            if step % train.log_every == 0 or last or step == self.done_step + 1:
                print(self._console_line(step, result), flush=True)
        if (train.eval_every and step % train.eval_every == 0) or step == train.max_steps:
            with self.engine.phases("validate"):
                self._validate(step, writer)
        self.engine.advance_save()
        final = last or self.engine.stopping
        if final or (train.save_every and step % train.save_every == 0):
            with self.engine.phases("save"):
                self.engine.save(self.run.run_dir, step, self.mixture.fingerprint, wait=final)

    def _stopped(self, step: int) -> dict[str, Any]:
        """A signal ended the run between its steps."""
        if self.ranks.is_main:
            print(
                f"stopped by a signal after step {step} of {self.last_step}; saved, and the same "
                "command continues",
                flush=True,
            )
        return {"step": step}

    def _record(self, step: int, result: StepResult) -> dict[str, Any]:
        step_time_s = self.step_times_s[-1]
        record: dict[str, Any] = {
            "step": step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "tokens": step * self.tokens_per_step,
            "lr": result.lr,
            "lr_values": result.lr_values,  # null without value tables
        }
        if result.lr_values is not None:
            record["aux_loss"] = result.aux_loss
        if result.expert_share:
            record |= {"balance_loss": result.balance_loss, "expert_share": result.expert_share}
        shares = self.mixture.proportions(0, step * self.config.train.global_batch_size)
        return record | {
            **result.memory,
            **{f"data/{name}": share for name, share in shares.items()},
            "tokens_per_s": self.tokens_per_step / step_time_s,
            "step_time_s": step_time_s,
        }

    def _console_line(self, step: int, result: StepResult) -> str:
        recent = self.step_times_s[-self.config.train.log_every :]
        step_s = sum(recent) / len(recent)
        eta_s = int(step_s * (self.last_step - step))
        return (
            f"{self.config.preset} step {step:>6}/{self.last_step}  loss {result.loss:.4f}  "
            f"grad_norm {result.grad_norm:.3f}  lr {result.lr:.2e}  "
            f"{self.tokens_per_step / step_s:,.0f} tokens/s  "
            f"ETA {eta_s // 3600:d}:{eta_s // 60 % 60:02d}:{eta_s % 60:02d}"
        )

    def _validate(self, step: int, writer: MetricsWriter | None) -> None:
        losses = self.losses()
        if "all" not in losses:
            return
        self.val_loss = losses["all"].loss
        if writer is not None:
            writer.write_validation(step, {name: r.loss for name, r in losses.items()})
            parts = "  ".join(f"{name} {r.loss:.4f}" for name, r in losses.items())
            print(f"{self.config.preset} step {step:>6} validation loss  {parts}", flush=True)

    def losses(self) -> dict[str, SubsetLoss]:
        """Validation losses of the current weights."""
        self.engine.engine.eval()
        limit = self.run.vocab_size
        return evaluate(
            lambda tokens: self.engine.model(tokens, vocab_limit=limit)["loss"],
            self.run.data_dir,
            self.config.model.seq_len,
            self.run.batches.micro_batch_size,
            self.config.train.eval_sequences,
            Reader(
                self.ranks.rank,
                self.ranks.world_size,
                self.ranks.device,
                self.engine.comm.all_reduce_,
            ),
        )

    def _summary(self) -> dict[str, Any]:
        steady = sorted(self.step_times_s[1:] or self.step_times_s)
        peak = torch.tensor(float(peak_memory_bytes(self.ranks.device)), device=self.ranks.device)
        summary = {
            "preset": self.config.preset,
            "step": self.last_step,
            "zero_stage": self.engine.zero_stage,
            "world_size": self.ranks.world_size,
            "val_loss": self.val_loss,
            "tokens_per_s": self.tokens_per_step / steady[len(steady) // 2],
            "peak_memory_bytes": int(self.engine.comm.all_reduce_max_(peak)),
        }
        if self.ranks.is_main:
            write_json(self.run.run_dir / "summary.json", summary)
        return summary
