"""One optimizer step at a time: the DeepSpeed engine as the training loop sees it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ultramem_ds.checkpoint import directory as checkpoints
from ultramem_ds.checkpoint.parameters import parameter_records
from ultramem_ds.checkpoint.safe import DamagedCheckpointError
from ultramem_ds.checkpoint.saver import Saver
from ultramem_ds.checkpoint.weights import WeightSource
from ultramem_ds.config.deepspeed import BatchPlan, engine_config, zero_stage
from ultramem_ds.config.load import to_dict
from ultramem_ds.config.schema import Config
from ultramem_ds.data.micro_batch import MicroBatch
from ultramem_ds.data.skips import NO_SKIPS, SkipRanges
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.optim.param_groups import SCHEDULES
from ultramem_ds.sharding.comm import Comm
from ultramem_ds.telemetry.gradient_signal import GradientStatistics
from ultramem_ds.telemetry.memory_stats import MemoryStatistics
from ultramem_ds.telemetry.phases import Phases
from ultramem_ds.telemetry.telemetry import Telemetry
from ultramem_ds.train.rng import load_rng, rng_file, rng_states
from ultramem_ds.train.step import StepResult
from ultramem_ds.watch.guards import StepGuard
from ultramem_ds.watch.signals import Ballot, StopRequest
from ultramem_ds.zero.engine_checkpoint import EngineCheckpoint
from ultramem_ds.zero.gate import StepGate, poison_unless_finite
from ultramem_ds.zero.parallelize import parallelize
from ultramem_ds.zero.runtime import Ranks


class TrainEngine:
    """The distributed model and its optimizer.

    Args:
        config: resolved configuration.
        ranks: where this process stands.
        deepspeed_json: contents of the DeepSpeed JSON.
        batches: how the global batch is cut up.
        phases: told what a step is doing.
        stop: whether this process has been asked to stop.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        deepspeed_json: dict[str, Any],
        batches: BatchPlan,
        phases: Phases,
        stop: StopRequest | None = None,
    ) -> None:
        self.config = config
        self.phases = phases
        self.ranks = ranks
        self.batches = batches
        self.zero_stage = zero_stage(deepspeed_json)
        # Dropout differs from rank to rank, parameters do not depend on it.
        torch.manual_seed(config.train.seed * 1_000_003 + ranks.rank)
        parallel = parallelize(
            config, ranks, engine_config(deepspeed_json, config, batches), phases
        )
        self.telemetry = Telemetry(config, ranks, parallel, phases)
        self.comm = Comm()
        self.guard = StepGuard(config.train, config.optim.clip_grad)
        self.gate = StepGate(
            parallel.engine,
            self.guard,
            self.comm,
            parallel.tables.joined_norm if parallel.tables is not None else None,
        )
        self.engine = parallel.engine
        self.tables = parallel.tables
        self.partition = parallel.partition
        self.table_comms = parallel.table_comms
        readers = self.tables.readers(self.model.memory_layers) if self.tables is not None else {}
        self.statistics = MemoryStatistics(self.model, self.comm, ranks.device, readers)
        self.gradient_statistics = GradientStatistics(
            parallel.gradient_signals, self.comm, ranks.device, config.memory.stats_every
        )
        self.checkpoint = EngineCheckpoint(
            self.engine, parallel.zero, parallel.own_states, parameter_records(config), self.comm
        )
        self.saver = Saver(
            self.checkpoint,
            self.comm,
            keep_last=config.train.keep_last,
            keep_every=config.train.keep_every,
            background=config.train.background_save,
        )
        request = stop if stop is not None else StopRequest()
        self.ballot = Ballot(lambda: request.requested, self.saver.busy)

    @property
    def model(self) -> LanguageModel:
        """The module inside the engine."""
        model: LanguageModel = self.engine.module
        return model

    @property
    def table_place(self) -> int:
        """This rank's place among those that share a copy of the tables; 0 without any."""
        return self.table_comms[0].rank if self.table_comms else 0

    def train_step(self, micro_batches: Iterator[MicroBatch], step: int) -> StepResult:
        """Take optimizer step ``step`` (counted from 0) on the next micro-batches."""
        self.engine.train()
        lrs = self._set_learning_rates(step)
        self.statistics.before_step(step)
        sums = torch.zeros(3, device=self.ranks.device)
        counts: Tensor | None = None
        losses: list[tuple[tuple[int, ...], Tensor]] = []
        weighted = self._weighted(micro_batches)
        for index in range(self.batches.accumulation_steps):
            with self.phases("data"):
                batch, weight = next(weighted)
                inputs = batch.to(self.ranks.device).model_inputs
            with self.phases("forward"):
                terms = self.engine(*inputs)
            with self.phases("backward"):
                terms["loss"] = terms["loss"] * weight
                total = terms["loss"] + terms["aux_loss"] + terms["balance_loss"]
                self.engine.backward(poison_unless_finite(total))
            losses.append((batch.sample_ids, total.detach()))
            sums += torch.stack(
                [terms[k].detach().float() for k in ("loss", "aux_loss", "balance_loss")]
            )
            load = terms["expert_counts"].float()
            counts = load if counts is None else counts + load
            with self.phases("optimizer"):
                if index == self.batches.accumulation_steps - 1 and self.tables is not None:
                    self.tables.publish_gradients()
                self.engine.step()
        with self.phases("optimizer"):
            decision = self.gate.take_decision()
            if self.tables is not None:
                self.tables.finish_step(lrs["tables"], decision)
            self.model.mark_stale()
        assert counts is not None
        votes = self.ballot.cast(self.ranks.device)
        packed = self.comm.all_reduce_(torch.cat([sums, votes, counts.flatten()])).cpu()
        sums, votes, load = packed.split([len(sums), len(votes), counts.numel()])
        self.ballot.count(votes)
        loss, aux, balance = (
            sums / (self.ranks.world_size * self.batches.accumulation_steps)
        ).tolist()
        load = load.view_as(counts)
        share = load / load.sum(-1, keepdim=True).clamp_min(1)
        return StepResult(
            loss=loss,
            aux_loss=aux,
            balance_loss=balance,
            decision=decision,
            suspects={} if decision.apply else self._suspects(losses),
            lr=lrs["matrices"],
            lr_values=lrs["tables"] if self.tables is not None else None,
            expert_share=share.tolist() if share.numel() else [],
            statistics={
                **self.statistics.after_step(step),
                **self.gradient_statistics.after_step(step),
            },
        )

    def _weighted(self, micro_batches: Iterator[MicroBatch]) -> Iterator[tuple[MicroBatch, float]]:
        """A step's micro-batches, each with the factor of its mean loss.

        The engine averages over micro-batches and ranks. Where only some targets count, a
        micro-batch weighs as many as it has: the step's loss is the mean over all of them. Then
        their number is needed first, so that all micro-batches are read; a collective.
        """
        steps = self.batches.accumulation_steps
        first = next(micro_batches)
        if first.loss_mask is None:
            yield first, 1.0
            yield from ((next(micro_batches), 1.0) for _ in range(steps - 1))
            return
        batches = [first, *(next(micro_batches) for _ in range(steps - 1))]
        mine = sum(batch.num_targets for batch in batches)
        total = torch.tensor(float(mine), dtype=torch.float64, device=self.ranks.device)
        scale = self.ranks.world_size * steps / max(1.0, float(self.comm.all_reduce_(total)))
        yield from ((batch, batch.num_targets * scale) for batch in batches)

    def _suspects(self, losses: list[tuple[tuple[int, ...], Tensor]]) -> dict[int, tuple[int, ...]]:
        """Samples of micro-batches whose loss is not finite, by rank; a collective."""
        mine = [ids for samples, loss in losses if not loss.isfinite() for ids in samples]
        found = self.comm.gather_objects(tuple(mine))
        return {rank: samples for rank, samples in enumerate(found) if samples}

    def _set_learning_rates(self, step: int) -> dict[str, float]:
        """Set this step's rates on the optimizer's groups; returns them by schedule."""
        lrs = {
            name: schedule(step, self.config.train.max_steps, self.config.optim)
            for name, schedule in SCHEDULES.items()
        }
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lrs[group["schedule"]]
        return lrs

    @property
    def stopping(self) -> bool:
        """Whether some rank had been asked to stop when the last step ended."""
        return self.ballot.yes[0] > 0

    def advance_save(self) -> None:
        """After every step: let a save in the background move on."""
        self.saver.advance(busy_ranks=self.ballot.yes[1])

    def save(
        self,
        run_dir: Path,
        step: int,
        data_fingerprint: str,
        skips: SkipRanges = NO_SKIPS,
        *,
        wait: bool = False,
    ) -> None:
        """Write a checkpoint after ``step`` optimizer steps and make it the latest.

        With ``train.background_save`` this returns when the state has been copied to host memory.
        If the files cannot be written, training goes on with a warning.

        Args:
            run_dir: the run directory.
            step: optimizer steps taken.
            data_fingerprint: of the mixture that they came from.
            skips: samples that were jumped over.
            wait: the run ends here: wait for the files, and raise if they cannot be written.

        Raises:
            OSError: on every rank, see ``wait``.
        """
        state = checkpoints.TrainerState(
            step=step,
            consumed_samples=step * self.batches.global_batch_size,
            data_fingerprint=data_fingerprint,
            world_size=self.ranks.world_size,
            partition=self.partition,
            zero_stage=self.zero_stage,
            config=to_dict(self.config),
            skipped_samples=[list(r) for r in skips.ranges],
            guard=self.guard.state(),
            micro_batch_size=self.batches.micro_batch_size,
        )
        self.saver.begin(run_dir, state, {rng_file(self.ranks): rng_states(self.ranks)})
        if wait:
            self.saver.finish()
            if self.saver.failure:
                raise OSError(self.saver.failure)

    def start_from(self, weights: WeightSource) -> None:
        """Take weights from elsewhere, before the first step.

        Raises:
            ValueError: on every rank, if some rank cannot read its part.
        """
        self.checkpoint.start_from(weights)
        self.model.mark_stale()

    def load(self, checkpoint: Path) -> checkpoints.TrainerState:
        """Restore parameters, optimizer state and random-number states, from any world size.

        Raises:
            DamagedCheckpointError: on every rank, if some rank finds it damaged or unsafe.
            ValueError: on every rank, if the checkpoint is another model's.
        """
        with self.comm.raising_together(DamagedCheckpointError):
            state = checkpoints.read_trainer_state(checkpoint)
        self.checkpoint.load(checkpoint)
        if state.world_size == self.ranks.world_size:
            load_rng(checkpoint / rng_file(self.ranks), self.ranks)
        self.guard.load_state(state.guard)
        self.statistics.window.reset()
        self.model.mark_stale()
        return state

    def load_last_good(self, run_dir: Path, before: int | None = None) -> checkpoints.TrainerState:
        """Go to the newest checkpoint that is whole, in a new process or in the middle of a run.

        A damaged one is passed over with a warning. All ranks try the same ones in the same order.

        Args:
            run_dir: the run directory.
            before: only checkpoints of fewer optimizer steps than this.

        Raises:
            ValueError: on every rank, if there is none.
        """
        self.saver.finish()
        limit, problem = before, f"{run_dir} has no checkpoint"
        while True:
            mine = [
                checkpoints.step_of(path)
                for path in checkpoints.resume_candidates(run_dir)
                if limit is None or checkpoints.step_of(path) < limit
            ]
            # The newest that any rank sees: one that does not see it finds it damaged.
            step = int(self.comm.all_reduce_max_(self._number(max(mine, default=-1))))
            if step < 0:
                raise ValueError(f"no checkpoint to go back to: {problem}")
            path = checkpoints.checkpoints_dir(run_dir) / checkpoints.tag_of(step)
            try:
                return self.load(path)
            except DamagedCheckpointError as error:
                limit, problem = step, str(error)
            if self.ranks.is_main:
                print(
                    f"WARNING: {path} cannot be used: {problem}. Trying the one before",
                    file=sys.stderr,
                    flush=True,
                )

    def _number(self, value: int) -> Tensor:
        return torch.tensor(float(value), device=self.ranks.device)
