"""Whether an optimizer step happens and how its gradient is clipped, decided once for all ranks.

All of DeepSpeed's ZeRO optimizers compute the global gradient norm and then call the optimizer
that they were given, once or once per flat buffer. The gate sits on that call, by PyTorch's own
hooks before and after an optimizer's ``step``:

1. the first call of a step decides: rank 0 judges the norm, and its decision is broadcast, since
   norms of sub-groups need not be bit-equal on all ranks;
2. a step that is refused finds no gradient, so that weights, moments and update counts stay as
   they are; one that is clipped finds its gradient scaled.

DeepSpeed itself clips nothing (``gradient_clipping`` is 0 in what it is given), and where it
refuses a norm that is not finite it does not call the optimizer at all: one NaN on one rank makes
the norm NaN on all, expert gradients and row-sparse tables included.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ultramem_ds.optim.decision import Decision
from ultramem_ds.sharding.comm import Comm


class Judge(Protocol):
    """Decides about norms; :class:`ultramem_ds.watch.guards.StepGuard` is one."""

    def judge(self, norm: float) -> Decision:
        """About a finite norm; changes nothing, asked on rank 0."""
        ...

    def remember(self, norm: float) -> None:
        """Of the norm that was decided about; told on every rank."""
        ...


def poison_unless_finite(loss: Tensor) -> Tensor:
    """The same loss and gradient, but NaN gradients if the loss is not finite.

    A loss can overflow where its gradient does not; this way the norm tells all ranks of both.
    """
    ones = torch.ones_like(loss.detach())
    return loss * torch.where(loss.detach().isfinite(), ones, torch.nan)


class StepGate:
    """Stands before every optimizer step of an engine.

    Args:
        engine: a DeepSpeed engine of stage 1, 2 or 3.
        judge: decides.
        comm: all ranks.
        joined_norm: the global norm of gradients that DeepSpeed does not see, the same on all
            ranks; None if there are none.
    """

    def __init__(
        self,
        engine: Any,
        judge: Judge,
        comm: Comm,
        joined_norm: Callable[[], Tensor] | None = None,
    ) -> None:
        self.judge = judge
        self._zero = engine.optimizer
        self._comm = comm
        self._joined_norm = joined_norm
        self._decision: Decision | None = None
        self._withheld: list[tuple[nn.Parameter, Tensor]] = []
        optimizer: torch.optim.Optimizer = self._zero.optimizer
        self._fused = bool(optimizer.defaults.get("fused"))
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def take_decision(self) -> Decision:
        """What was decided in the step that ``engine.step`` has just taken or refused."""
        decision, self._decision = self._decision, None
        return decision or Decision(math.inf, apply=False, clip_grad=0.0)  # DeepSpeed refused it

    def _decide(self) -> Decision:
        norm = torch.as_tensor(self._zero._global_grad_norm, dtype=torch.float64)
        if self._joined_norm is not None:
            norm = torch.hypot(norm, self._joined_norm().to(norm))
        decision = Decision(math.inf, apply=False, clip_grad=0.0)
        if self._comm.rank == 0 and math.isfinite(value := float(norm)) and value >= 0:
            decision = self.judge.judge(value)
        decision = Decision.of_numbers(self._comm.numbers_from_first(decision.to_numbers()))
        if math.isfinite(decision.grad_norm):
            self.judge.remember(decision.grad_norm)
        return decision

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._decision is None:
            self._decision = self._decide()
        params = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        if not self._decision.apply:
            self._withheld = [(param, param.grad) for param in params]
            for param in params:
                param.grad = None
            return
        scale = self._decision.grad_scale
        if self._fused:  # torch's fused kernels divide by it as they read the gradient
            # Filled there: a number copied from here would keep the host waiting.
            inverse = torch.full((), 1.0 / scale, device=params[0].device) if params else None
            optimizer.grad_scale = inverse if scale < 1.0 else None  # type: ignore[attr-defined]
        elif scale < 1.0:
            for param in params:
                param.grad.mul_(scale)

    def _after_step(self, *_: Any) -> None:
        for param, grad in self._withheld:
            param.grad = grad
        self._withheld = []
