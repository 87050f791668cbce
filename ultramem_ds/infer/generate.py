"""Decode batches of sequences, token by token, on one process.

Prompts of different lengths are padded on the left (``infer/cache``); a sequence that has ended
leaves the batch, so that the rest goes on alone. A sequence's random choices do not depend on its
neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ultramem_ds.infer.cache import DecodeCache
from ultramem_ds.infer.graphs import GraphStepper
from ultramem_ds.infer.sampling import Sampling, choose
from ultramem_ds.model.lm import LanguageModel

# B sequences still decoding, S tokens of the longest prompt, W vocabulary.


class NewToken(NamedTuple):
    """One decoded token."""

    sequence: int  # index of its prompt
    token: int


class Stepper(Protocol):
    """Runs one decode step of a batch."""

    def step(self, tokens_B1: Tensor) -> Tensor:
        """Logits ``(B, W)`` of the token after these."""
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these sequences."""
        ...


class EagerStepper:
    """Runs the model's own forward."""

    def __init__(self, model: LanguageModel, cache: DecodeCache) -> None:
        self.model = model
        self.cache = cache

    def step(self, tokens_B1: Tensor) -> Tensor:
        """See :class:`Stepper`."""
        return self.model.logits(tokens_B1, state=self.cache)[:, -1]

    def select(self, rows: Sequence[int]) -> None:
        """See :class:`Stepper`."""
        self.cache.select(rows)


def pad_left(prompts: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, list[int]]:
    """Token ids ``(B, S)`` with every prompt at the right edge, and each one's padding."""
    width = max(len(prompt) for prompt in prompts)
    padding = [width - len(prompt) for prompt in prompts]
    rows = [[fill] * pad + list(prompt) for pad, prompt in zip(padding, prompts)]
    return torch.tensor(rows), padding


@torch.no_grad()
def stream(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    eos_id: int,
    vocab_size: int,
) -> Iterator[NewToken]:
    """Yield the continuations of ``prompts`` as they are decoded.

    Args:
        model: in evaluation mode, with local lookups.
        prompts: each at least one token id; any lengths.
        sampling: how tokens are chosen and how many.
        eos_id: a sequence ends at this id, which is not yielded.
        vocab_size: entries of the tokenizer; the model's padding is never chosen.

    Raises:
        ValueError: if there is no prompt or one is empty.
    """
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one token; begin with the end-of-text id")
    device = model.embedding.weight.device
    tokens_BS, padding = pad_left(prompts, fill=eos_id)
    cache = DecodeCache(model, padding)
    live = list(range(len(prompts)))
    generators = [sampling.generator(i, device) for i in live]
    logits_BW = model.head(model.hidden(tokens_BS.to(device), state=cache)[0][:, -1])
    stepper: Stepper = (
        GraphStepper(model, cache) if device.type == "cuda" else EagerStepper(model, cache)
    )
    for remaining in reversed(range(sampling.max_new_tokens)):
        next_B = choose(logits_BW[:, :vocab_size], sampling, [generators[i] for i in live])
        chosen = next_B.tolist()
        for sequence, token in zip(live, chosen):
            if token != eos_id:
                yield NewToken(sequence, token)
        kept = [row for row, token in enumerate(chosen) if token != eos_id]
        if not kept or remaining == 0:
            return
        if len(kept) < len(live):
            stepper.select(kept)
            next_B = next_B[kept]
            live = [live[row] for row in kept]
        logits_BW = stepper.step(next_B.unsqueeze(1))


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    eos_id: int,
    vocab_size: int,
) -> list[list[int]]:
    """Continuations of ``prompts`` without the prompts; see :func:`stream`."""
    continuations: list[list[int]] = [[] for _ in prompts]
    for new in stream(model, prompts, sampling, eos_id=eos_id, vocab_size=vocab_size):
        continuations[new.sequence].append(new.token)
    return continuations
