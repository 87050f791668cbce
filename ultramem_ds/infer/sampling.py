"""How the next token is chosen. Letters: B sequences, W vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and when to stop.

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
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"--temperature {self.temperature} must be a number of 0 or more")
        if self.top_k < 0:
            raise ValueError(f"--top-k {self.top_k} must not be negative")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p {self.top_p} must be in (0, 1]")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed} must not be negative")

    def generator(self, index: int, device: torch.device) -> torch.Generator:
        """The random numbers of a batch's sequence ``index``: its choices are its own."""
        return torch.Generator(device=device).manual_seed((self.seed << 20) + index)


def distribution(logits_BW: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Unnormalised probabilities and token ids ``(B, W)``, most likely first.

    Top-p is taken of the whole distribution; both cuts keep at least the most likely token.
    """
    logits_BW = logits_BW.float() / sampling.temperature
    ordered_BW, ids_BW = logits_BW.sort(dim=-1, descending=True, stable=True)
    probs_BW = ordered_BW.softmax(-1)
    mass_before_BW = probs_BW.cumsum(-1) - probs_BW
    probs_BW = probs_BW.masked_fill(mass_before_BW >= sampling.top_p, 0.0)
    if sampling.top_k:
        probs_BW[:, sampling.top_k :] = 0.0
    return probs_BW, ids_BW


def choose(logits_BW: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """Pick one token per row of ``logits_BW`` with the row's own generator; ``(B,)`` int64."""
    if sampling.temperature == 0:
        return logits_BW.argmax(-1)
    probs_BW, ids_BW = distribution(logits_BW, sampling)
    picks = [
        torch.multinomial(probs_W, 1, generator=generator)
        for probs_W, generator in zip(probs_BW, generators, strict=True)
    ]
    return ids_BW.gather(-1, torch.stack(picks)).squeeze(-1)
