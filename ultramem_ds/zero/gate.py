"""Whether an optimizer step happens, decided on every rank alike before any weight changes.

All of DeepSpeed's ZeRO optimizers compute the global gradient norm, which every rank then knows,
before they touch a weight. The gate looks at it there, so that a decision costs no communication:

- ZeRO-3: ``_get_norm_groups`` returns the norms that make up the global one;
- ZeRO-1 and ZeRO-2: ``scaled_global_norm`` returns it;
- ``BF16_Optimizer`` (ZeRO-1 in bf16) keeps it to itself until it calls the optimizer inside.

To refuse a step the first two report an infinite norm, on which DeepSpeed drops the gradients and
leaves weights, moments and counters alone. A norm that is not finite is refused in any case: one
NaN on one rank makes the norm NaN on all, expert gradients and row-sparse tables included.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ultramem_ds.optim.decision import Decision
from ultramem_ds.zero.deepspeed_import import deepspeed


def poison_unless_finite(loss: Tensor) -> Tensor:
    """The same loss and gradient, but NaN gradients if the loss is not finite.

    A loss can overflow where its gradient does not; this way the norm tells all ranks of both.
    """
    ones = torch.ones_like(loss.detach())
    return loss * torch.where(loss.detach().isfinite(), ones, torch.nan)


class StepGate:
    """Asks ``judge`` before every optimizer step of an engine.

    Args:
        engine: a DeepSpeed engine of stage 1, 2 or 3; install after everything that joins its norm.
        judge: from the finite global norm to the decision; called on every rank.
    """

    def __init__(self, engine: Any, judge: Callable[[float], Decision]) -> None:
        self._judge = judge
        self._decision: Decision | None = None
        self._zero = engine.optimizer
        if hasattr(self._zero, "_get_norm_groups"):
            self._guard_stage3()
        elif hasattr(self._zero, "scaled_global_norm"):
            self._guard_stage12()
        else:
            self._guard_bf16()

    def take_decision(self) -> Decision:
        """What was decided in the step that ``engine.step`` has just taken or refused."""
        decision, self._decision = self._decision, None
        # DeepSpeed's bf16 optimizer refuses a norm that is not finite before it asks.
        return decision or Decision(math.inf, apply=False, clip_grad=0.0)

    def _decide(self, norm: Any) -> Decision:
        norm = float(norm)
        if math.isfinite(norm) and norm >= 0:
            self._decision = self._judge(norm)
        else:
            self._decision = Decision(math.inf, apply=False, clip_grad=0.0)
        return self._decision

    def _guard_stage3(self) -> None:
        zero, norm_groups = self._zero, self._zero._get_norm_groups
        combine = deepspeed.runtime.zero.stage3.combine_grad_norm_groups

        def guarded() -> list[Tensor]:
            groups: list[Tensor] = norm_groups()
            norm = combine(groups)
            decision = self._decide(norm)
            zero.clip_grad = decision.clip_grad
            return groups if decision.apply else [torch.full_like(norm, math.inf)]

        zero._get_norm_groups = guarded

    def _guard_stage12(self) -> None:
        zero, global_norm = self._zero, self._zero.scaled_global_norm

        def guarded(**options: Any) -> Tensor:
            norm: Tensor = global_norm(**options)
            decision = self._decide(norm)
            zero.clip_grad = decision.clip_grad
            return norm if decision.apply else torch.full_like(norm, math.inf)

        zero.scaled_global_norm = guarded
        # The norm finds what the separate look at every gradient (bf16) would.
        zero.check_grad_overflow = True
        zero.check_overflow = lambda **_: None

    def _guard_bf16(self) -> None:
        zero, optimizer = self._zero, self._zero.optimizer
        step = optimizer.step

        def guarded(*args: Any, **options: Any) -> Any:
            decision = self._decide(zero._global_grad_norm)
            if not decision.apply:
                zero.overflow = True
                return None
            # The gradients are clipped to clip_grad by now; a lower limit needs the rest.
            limit = zero.clip_grad if zero.clip_grad > 0 else math.inf
            done = Decision(decision.grad_norm, True, 0.0 if math.isinf(limit) else limit)
            rest = decision.grad_scale / done.grad_scale
            if rest < 1.0:
                for master in zero.fp32_groups_flat_partition:
                    master.grad.mul_(rest)
            return step(*args, **options)

        optimizer.step = guarded
