"""Learning rates as pure functions of the step (paper Table 4 and section 5.1)."""

from __future__ import annotations

import math

from ultramem_ds.config.schema import OptimConfig


def dense_lr(step: int, max_steps: int, optim: OptimConfig) -> float:
    """Linear warm-up over ``warmup_ratio * max_steps``, then cosine to ``lr_end_ratio * lr``.

    Args:
        step: the optimizer step about to be taken, counted from 0.
        max_steps: length of the schedule in optimizer steps.
        optim: peak, end ratio and warm-up ratio.

    Returns:
        The learning rate of every parameter but the value tables.
    """
    warmup_steps = round(optim.warmup_ratio * max_steps)
    if step < warmup_steps:
        return optim.lr * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return optim.lr * (optim.lr_end_ratio + (1.0 - optim.lr_end_ratio) * cosine)


def value_lr(step: int, max_steps: int, optim: OptimConfig) -> float:
    """Learning rate of the value tables.

    ``decay``: ``value_lr_multiplier`` times the dense rate at the start, falling linearly to it at
    the end (paper section 5.1). ``constant``: ``value_lr`` throughout (Lample et al., 2019).
    """
    if optim.value_lr_schedule == "constant":
        return optim.value_lr
    remaining = 1.0 - min(1.0, step / max_steps)
    return dense_lr(step, max_steps, optim) * (1.0 + (optim.value_lr_multiplier - 1.0) * remaining)


def key_lr(step: int, max_steps: int, optim: OptimConfig) -> float:
    """Learning rate of the memory layers' keys: ``key_lr_multiplier`` times the dense rate."""
    return optim.key_lr_multiplier * dense_lr(step, max_steps, optim)


def query_lr(step: int, max_steps: int, optim: OptimConfig) -> float:
    """Learning rate of what makes queries: ``query_lr_multiplier`` times the dense rate."""
    return optim.query_lr_multiplier * dense_lr(step, max_steps, optim)


def gain_lr(step: int, max_steps: int, optim: OptimConfig) -> float:
    """Learning rate of the gains of queries and keys: ``gain_lr_multiplier`` times the dense."""
    return optim.gain_lr_multiplier * dense_lr(step, max_steps, optim)
