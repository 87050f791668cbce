"""Decode batches of sequences, token by token, on one process or on ranks that share a model.

Prompts of different lengths are padded on the left (``infer/cache``); a sequence that has ended
leaves the batch, so that the rest goes on alone. A sequence's random choices do not depend on its
neighbours. Ranks that share tables step together: one whose sequences have all ended goes on with
an idle row until the others have finished.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ultramem_ds.infer.cache import DecodeCache
from ultramem_ds.infer.graphs import GraphStepper, can_capture
from ultramem_ds.infer.peers import ALONE, Peers
from ultramem_ds.infer.sampling import Sampling, choose
from ultramem_ds.model.lm import LanguageModel, Scored

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
        return last_logits(self.model, tokens_B1, self.cache)

    def select(self, rows: Sequence[int]) -> None:
        """See :class:`Stepper`."""
        self.cache.select(rows)


def last_logits(model: LanguageModel, tokens_BS: Tensor, cache: DecodeCache) -> Tensor:
    """Logits ``(B, W)`` after the last column."""
    B, S = tokens_BS.shape
    picks_B = torch.arange(1, B + 1, device=tokens_BS.device) * S - 1
    return model(tokens_BS, scored=Scored(cache, picks_B))


def pad_left(prompts: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, list[int]]:
    """Token ids ``(B, S)`` with every prompt at the right edge, and each one's padding."""
    width = max(len(prompt) for prompt in prompts)
    padding = [width - len(prompt) for prompt in prompts]
    rows = [[fill] * pad + list(prompt) for pad, prompt in zip(padding, prompts)]
    return torch.tensor(rows), padding


def never(new: NewToken) -> bool:
    """No sequence ends before its end-of-text token."""
    return False


@torch.no_grad()
def stream(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    eos_id: int,
    vocab_size: int,
    finished: Callable[[NewToken], bool] = never,
    peers: Peers = ALONE,
) -> Iterator[NewToken]:
    """Yield the continuations of ``prompts`` as they are decoded.

    Args:
        model: in evaluation mode.
        prompts: each at least one token id; any lengths. Without prompts this rank only keeps its
            peers company.
        sampling: how tokens are chosen and how many; the same number on all peers.
        eos_id: a sequence ends at this id, which is not yielded.
        vocab_size: entries of the tokenizer; the model's padding is never chosen.
        finished: asked after each token that was yielded: whether its sequence ends with it.
        peers: the ranks that share the model; all call this together.

    Raises:
        ValueError: if there is no prompt and nobody to keep company, or a prompt is empty.
    """
    if (not prompts and peers.world_size == 1) or not all(prompts):
        raise ValueError("every prompt needs at least one token; begin with the end-of-text id")
    device = model.embedding.weight.device
    live = list(range(len(prompts)))
    tokens_BS, padding = pad_left(prompts or [[eos_id]], fill=eos_id)
    cache = DecodeCache(model, padding)
    generators = [sampling.generator(i, device) for i in live]
    logits_BW = last_logits(model, tokens_BS.to(device), cache)
    # A captured graph holds no collective.
    graphs = device.type == "cuda" and peers.world_size == 1 and can_capture(model)
    stepper: Stepper = GraphStepper(model, cache) if graphs else EagerStepper(model, cache)
    for remaining in reversed(range(sampling.max_new_tokens)):
        kept: list[int] = []
        next_B = torch.full((1,), eos_id, device=device)
        if live:
            next_B = choose(logits_BW[:, :vocab_size], sampling, [generators[i] for i in live])
            for row, token in enumerate(next_B.tolist()):
                if token == eos_id:
                    continue
                new = NewToken(live[row], token)
                yield new
                if not finished(new):
                    kept.append(row)
        if remaining == 0 or peers.all_agree(not kept):
            return
        rows = kept or [0]  # the first row goes on idly where none is left
        if len(rows) < len(padding):
            stepper.select(rows)
            padding = [padding[row] for row in rows]
            next_B = next_B[rows]
        live = [live[row] for row in kept]
        logits_BW = stepper.step(next_B.unsqueeze(1))


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    eos_id: int,
    vocab_size: int,
    peers: Peers = ALONE,
) -> list[list[int]]:
    """Continuations of ``prompts`` without the prompts; see :func:`stream`."""
    continuations: list[list[int]] = [[] for _ in prompts]
    for new in stream(model, prompts, sampling, eos_id=eos_id, vocab_size=vocab_size, peers=peers):
        continuations[new.sequence].append(new.token)
    return continuations
