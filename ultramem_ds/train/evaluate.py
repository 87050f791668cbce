"""Validation loss per subset; every rank makes the same number of forwards (lookups are
collective).

Definitions, the same inside a run and in ``evaluate``:

- A subset is its documents, concatenated and cut into sequences of S predicted tokens; the last
  partial sequence is left out. Its loss is the mean over the predicted tokens of its sequences, or
  of the first ``max_sequences`` of them. The model is told of documents as in training.
  In subsets of prompts and answers the answers' tokens are the predicted ones.
- ``all`` is the mean of the subsets' losses weighted by the predicted tokens of *all* their
  sequences: with a limit it is an estimate of what it is without.

Letters: B sequences of one forward, S tokens, Q sequences of a subset, P ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ultramem_ds.config.schema import Config
from ultramem_ds.data.micro_batch import Boundaries, MicroBatch
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
    loss_of: Callable[[MicroBatch], Tensor],
    data_dir: Path,
    config: Config,
    *,
    micro_batch_size: int,
    max_sequences: int = 0,
    reader: Reader | None = None,
) -> dict[str, SubsetLoss]:
    """Mean next-token loss on every validation subset.

    Args:
        loss_of: maps a batch on the reader's device to the mean loss (0-dim) of its tokens; called
            under no_grad.
        data_dir: a prepared directory with ``validation/``.
        config: of the model: sequence length and document boundaries.
        micro_batch_size: largest B.
        max_sequences: take the first so many of each subset; 0 = all.
        reader: this process's part of the work; default: all of it. Results are the same on all.

    Returns:
        Subset name -> result, and ``all``; see the top of this file.
    """
    reader = reader or Reader()
    boundaries = Boundaries.of(config.data)
    results: dict[str, SubsetLoss] = {}
    weights: dict[str, float] = {}
    bytes_per_token: dict[str, float] = {}
    for subset in validation_subsets(data_dir):
        sequences = ValidationSet(data_dir, subset, config.model.seq_len)
        count = min(len(sequences), max_sequences or len(sequences))
        if count == 0:
            continue
        batches = _Batches(sequences, boundaries, count, micro_batch_size, reader)
        nats, targets = _sum_of_losses(loss_of, batches)
        if targets == 0:
            continue
        loss = nats / targets
        weights[subset] = len(sequences) * targets / count
        bytes_per_token[subset] = sequences.bytes_per_token
        results[subset] = SubsetLoss(
            loss=loss,
            tokens=targets,
            bits_per_byte=loss / math.log(2) / sequences.bytes_per_token,
        )
    if results:
        total = sum(weights.values())
        loss = sum(results[name].loss * weight for name, weight in weights.items()) / total
        size = sum(bytes_per_token[name] * weight for name, weight in weights.items()) / total
        results["all"] = SubsetLoss(
            loss=loss,
            tokens=sum(result.tokens for result in results.values()),
            bits_per_byte=loss / math.log(2) / size,
        )
    return results


@dataclass(frozen=True)
class _Batches:
    """The first ``count`` sequences of a subset; rank r takes sequences r, r + P, ..."""

    sequences: ValidationSet
    boundaries: Boundaries
    count: int
    micro_batch_size: int
    reader: Reader

    def indices(self) -> list[list[int]]:
        """By forward, this rank's sequences; as many forwards on every rank, the last perhaps of
        none.
        """
        reader = self.reader
        per_rank = -(-self.count // reader.world_size)
        mine = range(reader.rank, self.count, reader.world_size)
        size = self.micro_batch_size
        return [list(mine[begin : begin + size]) for begin in range(0, per_rank, size)]


def _sum_of_losses(loss_of: Callable[[MicroBatch], Tensor], batches: _Batches) -> tuple[float, int]:
    """Sum of the predicted tokens' losses over all ranks, and their number."""
    device = batches.reader.device
    total = torch.zeros(2, dtype=torch.float64, device=device)
    with torch.no_grad():
        for indices in batches.indices():
            # Without a sequence of its own a rank takes part in the lookups with the first.
            batch = batches.sequences.batch(indices or [0], batches.boundaries)
            targets = batch.num_targets if indices else 0
            total[0] += loss_of(batch.to(device)).double() * targets
            total[1] += targets
    nats, targets_seen = batches.reader.all_reduce_sum(total).tolist()
    return nats, int(targets_seen)
