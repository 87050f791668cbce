"""What a tokenizer loses: characters that it drops, refuses, or gives its unknown token for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

# Characters that texts of many kinds hold, tried when a tokenizer is loaded.
_PROBES = "etaoin shrdlu ETAOIN 0123456789 .,:;!?()[]{}<>=+-*/\\'\"_#@%&|~^$`\n\té\u2019\u20ac北🙂"
_CARRIERS = "aeo0A"


class Encoder(Protocol):
    """What is needed of a tokenizer."""

    unknown_id: int | None

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        ...


def refuse_if_unencodable(tokenizer: Encoder) -> None:
    """Encode characters that texts hold.

    Raises:
        ValueError: naming the first one that the tokenizer's library fails on: it has neither an
            entry for it nor an unknown token.
    """
    for character in _PROBES:
        try:
            tokenizer.encode(character)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(
                f"it cannot encode {character!r} and has no unknown token for it ({error}); it "
                "needs an unknown token, byte fallback or byte-level entries"
            ) from error


@dataclass
class Losses:
    """Characters of some text that do not survive its tokenizer.

    Attributes:
        dropped: occurrences of each character that leaves no token.
        unknown_tokens: unknown tokens among the ids.
    """

    dropped: Counter[str] = field(default_factory=Counter)
    unknown_tokens: int = 0

    def add(self, other: Losses) -> None:
        """Accumulate ``other``."""
        self.dropped.update(other.dropped)
        self.unknown_tokens += other.unknown_tokens

    def describe(self) -> list[str]:
        """A line for each kind of loss; empty if nothing is lost."""
        lines = []
        if self.dropped:
            shown = ", ".join(
                f"{count:,} x {char!r}" for char, count in self.dropped.most_common(5)
            )
            more = f" and {len(self.dropped) - 5:,} others" if len(self.dropped) > 5 else ""
            lines.append(
                f"the tokenizer drops characters: {self.dropped.total():,} of the text left no "
                f"token ({shown}{more})"
            )
        if self.unknown_tokens:
            lines.append(f"{self.unknown_tokens:,} tokens are the tokenizer's unknown token")
        return lines


class LossCounter:
    """Counts losses; each distinct character is tried once, so the cost per text is small."""

    def __init__(self, tokenizer: Encoder) -> None:
        self._tokenizer = tokenizer
        self._tried: set[str] = set()
        self._dropped: set[str] = set()
        known = (c for c in _CARRIERS if tokenizer.unknown_id not in tokenizer.encode(c * 2))
        # A tokenizer of whole words knows none: it drops nothing, and its unknown tokens count.
        self._carrier = next((c for c in known if tokenizer.encode(c)), None)
        self._without = tokenizer.encode(self._carrier * 2) if self._carrier else []

    def count(self, texts: Iterable[str], ids: npt.NDArray[np.integer]) -> Losses:
        """Losses of ``texts``, whose ids (and only theirs) are ``ids``."""
        losses = Losses()
        for text in texts:
            characters = set(text)
            for character in characters - self._tried:
                self._try(character)
            for character in characters & self._dropped:
                losses.dropped[character] += text.count(character)
        if self._tokenizer.unknown_id is not None:
            losses.unknown_tokens = int((ids == self._tokenizer.unknown_id).sum())
        return losses

    def _try(self, character: str) -> None:
        """A character is dropped if the text around it is encoded as if it were not there."""
        self._tried.add(character)
        if self._carrier is None:
            return
        between = f"{self._carrier}{character}{self._carrier}"
        if self._tokenizer.encode(between) == self._without:
            self._dropped.add(character)


def changed_by_decoding(tokenizer: Encoder, texts: Sequence[str]) -> list[str]:
    """Those of ``texts`` that do not come back from their ids as they were."""
    return [text for text in texts if tokenizer.decode(tokenizer.encode(text)) != text]
