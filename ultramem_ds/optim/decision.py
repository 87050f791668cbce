"""What was decided about one optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Decision:
    """About one optimizer step, the same on all ranks.

    Attributes:
        grad_norm: global norm before clipping; infinite where a gradient is not finite.
        apply: whether the weights change.
        clip_grad: largest norm of the gradients applied; 0 = no limit.
        spike: whether the norm stands out from those before.
    """

    grad_norm: float
    apply: bool
    clip_grad: float
    spike: bool = False

    @property
    def grad_scale(self) -> float:
        """What gradients are multiplied by to clip them."""
        if self.clip_grad <= 0:
            return 1.0
        return 1.0 / max(1.0, (self.grad_norm + 1e-6) / self.clip_grad)

    def to_numbers(self) -> tuple[float, ...]:
        """For a broadcast."""
        return (self.grad_norm, float(self.apply), self.clip_grad, float(self.spike))

    @classmethod
    def of_numbers(cls, numbers: Sequence[float]) -> Decision:
        """The reverse."""
        grad_norm, apply, clip_grad, spike = numbers
        return cls(grad_norm, bool(apply), clip_grad, bool(spike))
