"""Bad steps: which gradients are refused, what is remembered of them, when a run gives up.

A step is *bad*, and skipped on all ranks, if a loss or gradient is not finite, or if its norm is a
spike and ``train.grad_spike=skip``. A norm is a spike beyond

    mean + train.grad_spike_sigma * max(std, 5% of the mean)

of the last 128 norms, once there are 20. A spike enters that history as the limit it broke, so that
a lasting change of level is followed and not refused for ever.

Rank 0 decides; every rank remembers the norm that was decided about, so that their states stay
alike.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

from ultramem_ds.config.schema import TrainConfig
from ultramem_ds.data.skips import Range, format_ranges
from ultramem_ds.optim.decision import Decision

HISTORY = 128  # norms remembered
MIN_HISTORY = 20  # norms before a spike is one
MIN_SPREAD = 0.05  # least standard deviation assumed, relative to the mean


@dataclass(frozen=True)
class BadStep:
    """An optimizer step that was skipped.

    Attributes:
        step: counted from 1.
        reason: in words.
        loss: averaged over ranks, nats; may be NaN.
        grad_norm: global norm; infinite if a gradient was not finite.
        samples: the step's global samples.
        suspects: those of the micro-batches whose loss was not finite, by rank.
    """

    step: int
    reason: str
    loss: float
    grad_norm: float
    samples: tuple[Range, ...]
    suspects: dict[int, tuple[int, ...]]

    def describe(self) -> str:
        """One line for people."""
        text = (
            f"step {self.step} skipped: {self.reason}; loss {self.loss:.4g}, grad_norm "
            f"{self.grad_norm:.4g}, samples {format_ranges(self.samples)}"
        )
        for rank, samples in self.suspects.items():
            text += f"; loss not finite on rank {rank}, samples {_listed(samples)}"
        return text

    def to_dict(self) -> dict[str, Any]:
        """For JSON files, null where a number is not finite."""
        return {
            "step": self.step,
            "skipped": self.reason,
            "loss": _finite_or_none(self.loss),
            "grad_norm": _finite_or_none(self.grad_norm),
            "samples": [list(r) for r in self.samples],
            "suspects": {str(rank): list(samples) for rank, samples in self.suspects.items()},
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BadStep:
        """The reverse."""
        return cls(
            step=values["step"],
            reason=values["skipped"],
            loss=math.nan if values["loss"] is None else values["loss"],
            grad_norm=math.inf if values["grad_norm"] is None else values["grad_norm"],
            samples=tuple((a, b) for a, b in values["samples"]),
            suspects={int(rank): tuple(ids) for rank, ids in values["suspects"].items()},
        )


class TooManyBadStepsError(ValueError):
    """``train.max_bad_steps`` steps in a row were skipped; ``steps`` says which."""

    def __init__(self, steps: list[BadStep]) -> None:
        lines = "\n".join(f"  {bad.describe()}" for bad in steps)
        super().__init__(
            f"{len(steps)} steps in a row were skipped (train.max_bad_steps):\n{lines}\n"
            "Look at the data with `inspect-data`, jump over it with --skip-samples A:B, or, with "
            "--extend, lower optim.lr or let train.rollback=true go back and around it"
        )
        self.steps = steps


class StepGuard:
    """Judges gradient norms and counts bad steps; its state is part of checkpoints.

    Args:
        train: what to do about spikes, when to stop.
        clip_grad: ``optim.clip_grad``.

    Attributes:
        bad_steps: skipped steps of the run so far.
        recent: the bad steps since the last good one.
    """

    def __init__(self, train: TrainConfig, clip_grad: float) -> None:
        self._train = train
        self._clip_grad = clip_grad
        self._norms: deque[float] = deque(maxlen=HISTORY)
        self.bad_steps = 0
        self.recent: list[BadStep] = []

    def limit(self) -> float:
        """The norm beyond which the next one is a spike."""
        if self._train.grad_spike == "off" or len(self._norms) < MIN_HISTORY:
            return math.inf
        mean = statistics.fmean(self._norms)
        spread = max(statistics.pstdev(self._norms), MIN_SPREAD * mean)
        return mean + self._train.grad_spike_sigma * spread

    def judge(self, norm: float) -> Decision:
        """Decide about a finite norm."""
        limit = self.limit()
        if norm <= limit:
            return Decision(norm, True, self._clip_grad)
        if self._train.grad_spike == "skip":
            return Decision(norm, False, self._clip_grad, spike=True)
        return Decision(norm, True, min(limit, self._clip_grad or math.inf), spike=True)

    def remember(self, norm: float) -> None:
        """Enter a norm that was decided about into the history."""
        self._norms.append(min(norm, self.limit()))

    def review(
        self,
        step: int,
        decision: Decision,
        loss: float,
        samples: tuple[Range, ...],
        suspects: dict[int, tuple[int, ...]],
    ) -> BadStep | None:
        """Count a step that has just been taken or skipped; the latter is returned.

        Args:
            step: counted from 1.
            decision: about it.
            loss: averaged over ranks, nats.
            samples: global samples of the step.
            suspects: of a skipped step, see :class:`BadStep`.
        """
        if decision.apply:
            self.recent = []
            return None
        if not math.isfinite(loss):
            reason = "loss not finite"
        elif not math.isfinite(decision.grad_norm):
            reason = "gradient not finite"
        else:
            reason = "gradient norm spike"
        bad = BadStep(step, reason, loss, decision.grad_norm, samples, suspects)
        self.bad_steps += 1
        self.recent = [*self.recent[1 - HISTORY :], bad]
        return bad

    def check(self) -> None:
        """After a review.

        Raises:
            TooManyBadStepsError: too many bad steps in a row.
        """
        if 0 < self._train.max_bad_steps <= len(self.recent):
            raise TooManyBadStepsError(self.recent)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to decide as this one would."""
        return {
            "norms": list(self._norms),
            "bad_steps": self.bad_steps,
            "recent": [bad.to_dict() for bad in self.recent],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up where a checkpoint's run was; an empty state is a fresh start."""
        self._norms = deque(state.get("norms", []), maxlen=HISTORY)
        self.bad_steps = int(state.get("bad_steps", 0))
        self.recent = [BadStep.from_dict(bad) for bad in state.get("recent", [])]


def _finite_or_none(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _listed(samples: tuple[int, ...]) -> str:
    return " ".join(map(str, samples[:16])) + (" ..." if len(samples) > 16 else "")
