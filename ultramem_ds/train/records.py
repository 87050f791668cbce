"""What a run writes about its steps: lines of ``metrics.jsonl`` and of the console."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ultramem_ds.config.schema import Config
from ultramem_ds.data.mixture import Mixture
from ultramem_ds.data.skips import SkipRanges
from ultramem_ds.train.step import StepResult
from ultramem_ds.watch.guards import BadStep


class StepRecords:
    """Lines about the steps of one process of a run.

    Args:
        config: of the run.
        last_step: where it ends.
    """

    def __init__(self, config: Config, last_step: int) -> None:
        self._config = config
        self._last_step = last_step
        self.tokens_per_step = config.train.global_batch_size * config.model.seq_len
        self.step_times_s: list[float] = []

    def line(self, step: int, result: StepResult) -> str:
        """For the console, over the steps since the last such line."""
        recent = self.step_times_s[-self._config.train.log_every :]
        step_s = sum(recent) / len(recent)
        eta_s = int(step_s * (self._last_step - step))
        return (
            f"{self._config.preset} step {step:>6}/{self._last_step}  loss {result.loss:.4f}  "
            f"grad_norm {result.grad_norm:.3f}  lr {result.lr:.2e}  "
            f"{self.tokens_per_step / step_s:,.0f} tokens/s  "
            f"ETA {eta_s // 3600:d}:{eta_s // 60 % 60:02d}:{eta_s % 60:02d}"
        )

    def record(
        self, step: int, result: StepResult, bad: BadStep | None, bad_steps: int
    ) -> dict[str, Any]:
        """For ``metrics.jsonl``.

        Args:
            step: counted from 1.
            result: what it measured.
            bad: if it was skipped, why.
            bad_steps: skipped steps of the run so far.
        """
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
        if bad_steps:
            record["bad_steps"] = bad_steps
        if result.clipped_to is not None:
            record["grad_spike_clipped_to"] = result.clipped_to
        if bad is not None:
            record |= bad.to_dict()
        return {**record, **result.statistics}

    @property
    def speed(self) -> dict[str, float]:
        """Of the last step."""
        step_time_s = self.step_times_s[-1]
        return {"tokens_per_s": self.tokens_per_step / step_time_s, "step_time_s": step_time_s}

    @property
    def steady_tokens_per_s(self) -> float:
        """Of the median step, the first of the process left out."""
        steady = sorted(self.step_times_s[1:] or self.step_times_s)
        return self.tokens_per_step / steady[len(steady) // 2]


def realised_shares(mixture: Mixture, skips: SkipRanges, num_samples: int) -> dict[str, float]:
    """Share of each subset in the first ``num_samples`` samples that are not jumped over."""
    total: dict[str, float] = dict.fromkeys(mixture.subsets, 0.0)
    ranges: Sequence[tuple[int, int]] = skips.samples(0, num_samples)
    for begin, end in ranges:
        for name, share in mixture.proportions(begin, end).items():
            total[name] += share * (end - begin) / num_samples
    return total
