"""What one optimizer step tells."""

from __future__ import annotations

from dataclasses import dataclass

from ultramem_ds.optim.decision import Decision


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step measured, averaged over ranks and micro-batches.

    Attributes:
        loss: next-token cross-entropy, nats.
        aux_loss: weighted auxiliary loss of the memory layers (eq. 12).
        balance_loss: weighted load-balance loss of MoE.
        decision: about the step, with the global gradient norm before clipping.
        suspects: if it was skipped, by rank the samples of micro-batches without a finite loss.
        lr: learning rate of everything but value tables.
        lr_values: learning rate of value tables; None without any.
        expert_share: per MoE block, each expert's share of the routed tokens; empty without MoE.
        statistics: of gradients and memory layers where a window of ``memory.stats_every`` ends.
    """

    loss: float
    aux_loss: float
    balance_loss: float
    decision: Decision
    suspects: dict[int, tuple[int, ...]]
    lr: float
    lr_values: float | None
    expert_share: list[list[float]]
    statistics: dict[str, float]

    @property
    def grad_norm(self) -> float:
        """Global gradient norm before clipping; infinite where a gradient is not finite."""
        return self.decision.grad_norm

    @property
    def clipped_to(self) -> float | None:
        """The limit that a spike's gradient was clipped to, if it was one."""
        return self.decision.clip_grad if self.decision.spike and self.decision.apply else None
