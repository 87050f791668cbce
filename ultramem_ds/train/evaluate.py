"""Validation loss per subset; every rank makes the same number of forwards (lookups are
collective).

Letters: B sequences of one forward, S tokens, Q sequences of a subset, P ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ultramem_ds.data.validation import ValidationSet, validation_subsets


@dataclass(frozen=True)
class SubsetLoss:
    """Validation result of one subset.

    Attributes:
        loss: next-token cross-entropy, nats per token.
        tokens: number of predicted tokens.
        bits_per_byte: ``loss`` in bits, per byte of text.
    """

    loss: float
    tokens: int
    bits_per_byte: float

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True)
class Reader:
    """Which sequences this process evaluates, and how sums over processes are taken."""

    rank: int = 0
    world_size: int = 1
    device: torch.device | str = "cpu"
    all_reduce_sum: Callable[[Tensor], Tensor] = lambda tensor: tensor


def evaluate(
    loss_of: Callable[[Tensor], Tensor],
    data_dir: Path,
    seq_len: int,
    micro_batch_size: int,
    max_sequences: int = 0,
    reader: Reader | None = None,
) -> dict[str, SubsetLoss]:
    """Mean next-token loss on every validation subset.

    Args:
        loss_of: maps token ids ``(B, S + 1)`` to their mean loss (0-dim); called under no_grad.
        data_dir: a prepared directory with ``validation/``.
        seq_len: S.
        micro_batch_size: largest B.
        max_sequences: take the first so many of each subset; 0 = all.
        reader: this process's part of the work; default: all of it. Results are the same on all.

    Returns:
        Subset name -> result, and ``all``: the token-weighted mean.
    """
    reader = reader or Reader()
    results: dict[str, SubsetLoss] = {}
    for subset in validation_subsets(data_dir):
        sequences = ValidationSet(data_dir, subset, seq_len)
        count = min(len(sequences), max_sequences or len(sequences))
        if count == 0:
            continue
        total = _sum_of_losses(loss_of, sequences, count, micro_batch_size, reader)
        results[subset] = SubsetLoss(
            loss=total / count,
            tokens=count * seq_len,
            bits_per_byte=total / count / math.log(2) / sequences.bytes_per_token,
        )
    if results:
        tokens = sum(r.tokens for r in results.values())
        nats = sum(r.loss * r.tokens for r in results.values())
        bits = sum(r.loss * r.tokens / math.log(2) for r in results.values())
        size = sum(r.loss * r.tokens / math.log(2) / r.bits_per_byte for r in results.values())
        results["all"] = SubsetLoss(loss=nats / tokens, tokens=tokens, bits_per_byte=bits / size)
    return results


def _sum_of_losses(
    loss_of: Callable[[Tensor], Tensor],
    sequences: ValidationSet,
    count: int,
    micro_batch_size: int,
    reader: Reader,
) -> float:
    """Sum of the sequences' mean losses; rank r takes sequences r, r + P, ..."""
    per_rank = -(-count // reader.world_size)
    total = torch.zeros((), dtype=torch.float64, device=reader.device)
    with torch.no_grad():
        for begin in range(0, per_rank, micro_batch_size):
            end = min(begin + micro_batch_size, per_rank)
            ids = [i * reader.world_size + reader.rank for i in range(begin, end)]
            real = [i for i in ids if i < count]
            rows = np.stack([sequences[i] for i in (real or [0])])
            loss = loss_of(torch.from_numpy(rows).to(reader.device))
            total += loss.double() * len(real)
    return float(reader.all_reduce_sum(total))
