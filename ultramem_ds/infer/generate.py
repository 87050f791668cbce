"""Decode token by token from one process's model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ultramem_ds.infer.cache import DecodeCache
from ultramem_ds.model.lm import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: stop after so many.
        temperature: 0 takes the most likely token.
        top_k: keep the k most likely tokens; 0 = all.
        top_p: keep the smallest set of tokens with this mass; 1 = all.
        seed: of the random choices.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens {self.max_new_tokens} must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"--temperature {self.temperature} must not be negative")
        if self.top_k < 0:
            raise ValueError(f"--top-k {self.top_k} must not be negative")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p {self.top_p} must be in (0, 1]")


def choose(logits_BW: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Pick one token per row of ``logits_BW``; returns ``(B,)`` int64."""
    if sampling.temperature == 0:
        return logits_BW.argmax(-1)
    logits_BW = logits_BW.float() / sampling.temperature
    ordered_BW, ids_BW = logits_BW.sort(dim=-1, descending=True, stable=True)
    probs_BW = ordered_BW.softmax(-1)
    mass_before_BW = probs_BW.cumsum(-1) - probs_BW
    probs_BW = probs_BW.masked_fill(mass_before_BW >= sampling.top_p, 0.0)
    if sampling.top_k:
        probs_BW[:, sampling.top_k :] = 0.0
    pick_B1 = torch.multinomial(probs_BW, 1, generator=generator)
    return ids_BW.gather(-1, pick_B1).squeeze(-1)


@torch.no_grad()
def stream(
    model: LanguageModel,
    prompt: Sequence[int],
    sampling: Sampling,
    eos_id: int,
    vocab_size: int,
) -> Iterator[int]:
    """Yield the continuation of ``prompt``, one token id at a time.

    Args:
        model: in evaluation mode, with local lookups.
        prompt: at least one token id.
        sampling: how tokens are chosen and how many.
        eos_id: decoding stops at this id, which is not yielded.
        vocab_size: entries of the tokenizer; the model's padding is never chosen.
    """
    device = model.embedding.weight.device
    generator = torch.Generator(device=device).manual_seed(sampling.seed)
    cache = DecodeCache(model)
    tokens_BS = torch.tensor([list(prompt)], device=device)
    for _ in range(sampling.max_new_tokens):
        logits_BW = model.logits(tokens_BS, state=cache)[:, -1, :vocab_size]
        next_B = choose(logits_BW, sampling, generator)
        if int(next_B[0]) == eos_id:
            return
        yield int(next_B[0])
        tokens_BS = next_B.unsqueeze(1)
