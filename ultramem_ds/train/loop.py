"""The training run: resume, step, validate, save."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ultramem_ds.checkpoint import directory as checkpoints
from ultramem_ds.config.load import to_dict
from ultramem_ds.data.loader import BatchLoader
from ultramem_ds.data.micro_batch import Boundaries
from ultramem_ds.data.mixture import Mixture
from ultramem_ds.data.skips import Range, SkipRanges, format_ranges
from ultramem_ds.planning.batches import agree_on_batches
from ultramem_ds.sharding.comm import Comm
from ultramem_ds.telemetry.board import hyper_parameters
from ultramem_ds.telemetry.memory_use import peak_memory_bytes
from ultramem_ds.telemetry.metrics import MetricsWriter
from ultramem_ds.telemetry.phases import Phases
from ultramem_ds.train.engine import TrainEngine
from ultramem_ds.train.evaluate import Reader, SubsetLoss, evaluate
from ultramem_ds.train.judge import Judge, MakeJudge
from ultramem_ds.train.records import StepRecords, realised_shares
from ultramem_ds.train.rollback import roll_back
from ultramem_ds.train.run import Run, skips_of
from ultramem_ds.train.run_dir import prepare_run_dir
from ultramem_ds.train.step import StepResult
from ultramem_ds.utils.console import LOGS, LibraryOutput
from ultramem_ds.utils.files import write_json
from ultramem_ds.watch.desync import DesyncGuard, code_digest, digest
from ultramem_ds.watch.faultlog import log_fault
from ultramem_ds.watch.guards import BadStep, TooManyBadStepsError
from ultramem_ds.watch.runlock import only_job
from ultramem_ds.watch.signals import StopRequest
from ultramem_ds.watch.watchdog import Watchdog
from ultramem_ds.zero.replicated import replicated, replicated_blocks
from ultramem_ds.zero.runtime import Ranks, runtime


def train(
    run: Run, libraries: LibraryOutput | None = None, make_judge: MakeJudge | None = None
) -> dict[str, Any]:
    """Train to ``train.max_steps`` (or ``train.stop_at_step``); returns the run's summary.

    Args:
        run: checked.
        libraries: what they print, to be kept in the run directory; None leaves it where it goes.
        make_judge: evaluates ``train.tasks``.

    Returns:
        ``{step, val_loss, tokens_per_s, peak_memory_bytes, ...}``, the same on every rank.

    Raises:
        ValueError: on every rank: the run directory or ``train.tasks`` cannot be used.
    """
    judge: Judge | None = None
    if run.config.train.tasks:
        if make_judge is None:
            raise ValueError("train.tasks needs make_judge, as the train verb gives it")
        judge = make_judge(run)
    phases = Phases()
    stop = StopRequest()
    with stop.listening(), runtime() as ranks, contextlib.ExitStack() as stack:
        comm = Comm()
        start: tuple[str, Path | None] = ("", None)
        with comm.raising_together(ValueError), comm.raising_together(OSError):
            if ranks.is_main:
                if judge is not None:
                    judge.prepare()
                stack.enter_context(only_job(run.run_dir))
                start = prepare_run_dir(run)
        # Another node's view of a shared directory may be older.
        job, latest = comm.from_first(start)
        if libraries is not None:
            libraries.keep(run.run_dir / LOGS / f"rank-{ranks.rank:05d}.log")
        stack.enter_context(Watchdog(run.run_dir, job, ranks, phases, run.config.train.watchdog_s))
        return _train(replace(run, resume_from=latest), ranks, phases, stop, judge)


def _train(
    run: Run, ranks: Ranks, phases: Phases, stop: StopRequest, judge: Judge | None
) -> dict[str, Any]:
    """What every rank does, from an empty process group to the summary."""
    config = run.config
    done_step = recorded = 0
    if run.resume_from is not None:
        state = checkpoints.read_trainer_state(run.resume_from)
        done_step, recorded = state.step, state.micro_batch_size
    last_step = config.train.max_steps
    if config.train.stop_at_step:
        last_step = min(last_step, config.train.stop_at_step)
    if done_step >= last_step:
        if ranks.is_main:
            print(f"{run.run_dir} is finished: step {done_step} of {last_step}", flush=True)
        return {"step": done_step}
    batches = agree_on_batches(config, Comm(), ranks.device, recorded)
    run = replace(run, batches=batches)
    engine = TrainEngine(config, ranks, run.deepspeed_json, run.batches, phases, stop)
    loaded = None
    if run.resume_from is not None:
        loaded = engine.load_last_good(run.run_dir)
        done_step = loaded.step
        if ranks.is_main:
            print(f"resuming {run.run_dir} from step {done_step}", flush=True)
    elif run.origin is not None:
        with engine.comm.raising_together(ValueError):
            weights = run.origin.open(ranks.rank)
        engine.start_from(weights)
    skips = skips_of(run.skip_samples, loaded)
    if skips.ranges and ranks.is_main:
        print(f"jumping over samples {format_ranges(skips.ranges)}", flush=True)
    return _Loop(run, ranks, engine, run.mixture, skips, done_step, last_step, judge).run_to_end()


class _Loop:
    """State of one call of :func:`train`: where it is and what it writes."""

    def __init__(
        self,
        run: Run,
        ranks: Ranks,
        engine: TrainEngine,
        mixture: Mixture,
        skips: SkipRanges,
        done_step: int,
        last_step: int,
        judge: Judge | None = None,
    ) -> None:
        self.run = run
        self.config = run.config
        self.ranks = ranks
        self.engine = engine
        self.mixture = mixture
        self.skips = skips
        self.judge = judge
        self.rollbacks = 0
        self.desync = DesyncGuard(
            engine.comm,
            ranks.device,
            lambda: replicated(engine.model),
            run.config.train.desync_every,
            lambda: replicated_blocks(engine.model, engine.tables),
            engine.table_place,
        )
        self.done_step = done_step
        self.last_step = last_step
        self.records = StepRecords(run.config, last_step)
        self.val_loss: float | None = None

    def run_to_end(self) -> dict[str, Any]:
        self._compare_ranks(self.done_step, at_start=True)
        while True:
            try:
                reached = self._run_steps()
                return self._summary() if reached == self.last_step else self._stopped(reached)
            except TooManyBadStepsError as stop:
                self.rollbacks += 1
                with self.engine.phases("rollback"):
                    self.done_step, self.skips = roll_back(
                        self.engine, self.run.run_dir, stop, self.rollbacks, self.skips
                    )

    def _run_steps(self) -> int:
        """From ``done_step`` to the last step, or to a signal; returns the step reached."""
        train = self.config.train
        writer = None
        if self.ranks.is_main:
            hyper = hyper_parameters(self.config, self.ranks.world_size)
            writer = MetricsWriter(self.run.run_dir, self.done_step + 1, hyper)
        loader = BatchLoader(
            self.mixture,
            global_batch_size=train.global_batch_size,
            micro_batch_size=self.run.batches.micro_batch_size,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            start_step=self.done_step,
            num_workers=self.config.data.num_workers,
            prefetch=self.config.data.prefetch,
            boundaries=Boundaries.of(self.config.data),
            skips=self.skips,
        )
        try:
            micro_batches = iter(loader)
            self.engine.telemetry.start()
            for step in range(self.done_step, self.last_step):
                self.engine.phases.begin_step(step + 1)
                begin = time.perf_counter()
                result = self.engine.train_step(micro_batches, step)
                self.records.step_times_s.append(time.perf_counter() - begin)
                self._after_step(step + 1, result, writer)
                if self.engine.stopping:
                    return step + 1
        finally:
            loader.close()
            if writer is not None:
                writer.close()
        return self.last_step

    def _after_step(self, step: int, result: StepResult, writer: MetricsWriter | None) -> None:
        train = self.config.train
        last = step == self.last_step
        bad = self.engine.guard.review(
            step, result.decision, result.loss, self._samples(step), result.suspects
        )
        if writer is not None:
            writer.write_step(self._record(step, result, bad))
            if bad is not None:
                log_fault(self.run.run_dir, "bad step", bad.describe(), **bad.to_dict())
            if step % train.log_every == 0 or last or step == self.done_step + 1:
                print(self.records.line(step, result), flush=True)
        self.engine.guard.check()
        if self.judge is not None and self._due(step, train.tasks_every):
            with self.engine.phases("tasks"):
                self._run_tasks(step, self.judge, writer)
            self.engine.telemetry.charge("tasks")
        if self._due(step, train.eval_every):
            with self.engine.phases("validate"):
                self._validate(step, writer)
            self.engine.telemetry.charge("validate")
        if self.desync.due(step):
            self._compare_ranks(step)
        self.engine.advance_save()
        final = last or self.engine.stopping
        if final or (train.save_every and step % train.save_every == 0):
            with self.engine.phases("save"):
                self.engine.save(
                    self.run.run_dir, step, self.mixture.fingerprint, self.skips, wait=final
                )

    def _due(self, step: int, every: int) -> bool:
        """Whether what is done every so many steps, and at the end of the schedule, is due."""
        return bool(every and step % every == 0) or step == self.config.train.max_steps

    def _stopped(self, step: int) -> dict[str, Any]:
        """A signal ended the run between its steps."""
        if self.ranks.is_main:
            print(
                f"stopped by a signal after step {step} of {self.last_step}; saved, and the same "
                "command continues",
                flush=True,
            )
        return {"step": step}

    def _compare_ranks(self, step: int, at_start: bool = False) -> None:
        """Stop the run if the ranks do not agree on what they are doing; a collective."""
        engine = self.engine
        items = {
            "step": step,
            "data": digest((self.mixture.fingerprint, self.skips.ranges)),
            "guard": digest(engine.guard.state()),
            "learning rates": digest([g["lr"] for g in engine.engine.optimizer.param_groups]),
        }
        if at_start:
            items["configuration"] = digest(
                (to_dict(self.config), self.run.deepspeed_json, self.run.batches)
            )
            items["code"] = code_digest()
        self.desync.compare(items, everything=at_start)

    def _samples(self, step: int) -> tuple[Range, ...]:
        """Global samples of optimizer step ``step``, counted from 1."""
        size = self.config.train.global_batch_size
        return self.skips.samples((step - 1) * size, step * size)

    def _record(self, step: int, result: StepResult, bad: BadStep | None) -> dict[str, Any]:
        consumed = step * self.config.train.global_batch_size
        shares = realised_shares(self.mixture, self.skips, consumed)
        speed = self.records.speed
        return {
            **self.records.record(step, result, bad, self.engine.guard.bad_steps),
            **{f"data/{name}": share for name, share in shares.items()},
            **speed,
            **self.engine.telemetry.read(speed["tokens_per_s"]),
        }

    def _run_tasks(self, step: int, judge: Judge, writer: MetricsWriter | None) -> None:
        scores = judge.evaluate(self.engine)
        if writer is not None:
            writer.write_tasks(step, scores)
            parts = "  ".join(f"{name} {score:.4f}" for name, score in scores.items())
            print(f"{self.config.preset} step {step:>6} tasks  {parts}", flush=True)

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
            lambda batch: self.engine.model(*batch.model_inputs, vocab_limit=limit)["loss"],
            self.run.data_dir,
            self.config,
            micro_batch_size=self.run.batches.micro_batch_size,
            max_sequences=self.config.train.eval_sequences,
            reader=Reader(
                self.ranks.rank,
                self.ranks.world_size,
                self.ranks.device,
                self.engine.comm.all_reduce_,
            ),
        )

    def _summary(self) -> dict[str, Any]:
        peak = torch.tensor(float(peak_memory_bytes(self.ranks.device)), device=self.ranks.device)
        summary = {
            "preset": self.config.preset,
            "step": self.last_step,
            "zero_stage": self.engine.zero_stage,
            "world_size": self.ranks.world_size,
            "val_loss": self.val_loss,
            "tokens_per_s": self.records.steady_tokens_per_s,
            "peak_memory_bytes": int(self.engine.comm.all_reduce_max_(peak)),
            "phase_s": self.engine.telemetry.finish(),
            "peak_flops_from": self.engine.telemetry.peak_source,
        }
        if self.ranks.is_main:
            write_json(self.run.run_dir / "summary.json", summary)
        return summary
