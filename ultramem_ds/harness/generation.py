"""Generated answers to a list of prompts, over all ranks of a model, ended by stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ultramem_ds.data.tokenizers import Tokenizer
from ultramem_ds.harness.requests import Tokens
from ultramem_ds.infer.generate import NewToken, stream
from ultramem_ds.infer.peers import Peers
from ultramem_ds.infer.sampling import Sampling
from ultramem_ds.infer.text import Detokenizer
from ultramem_ds.model.lm import LanguageModel

MAX_ROWS = 64  # sequences of one batch: a step's products no longer gain from more


@dataclass(frozen=True)
class Prompt:
    """A prompt and what ends its answer."""

    tokens: Tokens
    stops: tuple[str, ...]
    sampling: Sampling


def cut_at(text: str, stops: Sequence[str]) -> str:
    """``text`` up to the first occurrence of any stop string; empty ones stop nothing."""
    ends = [text.find(stop) for stop in stops if stop]
    return text[: min((end for end in ends if end >= 0), default=len(text))]


class Answer:
    """The tokens of one answer so far, and whether a stop string has appeared in their text.

    A stop string may begin inside one token and end inside another, so that text is looked at, not
    tokens. Only what a further token can complete is looked at again.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Tokens, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._reach = max((len(stop) for stop in self._stops), default=0)
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._text = ""

    def push(self, token: int) -> bool:
        """Add a token; whether the answer ends with it."""
        piece = self._detokenizer.push(token)
        self._text += piece
        tail = self._text[-(self._reach + len(piece)) :]
        return any(stop in tail for stop in self._stops)

    def text(self) -> str:
        """The answer without the stop string and what follows it."""
        return cut_at(self._text + self._detokenizer.rest(), self._stops)


@dataclass(frozen=True)
class Generator:
    """A model as generation needs it.

    Attributes:
        model: in evaluation mode.
        tokenizer: of the model.
        max_tokens: keys and values held at a time, padding included.
        peers: the ranks that share the model.
        advance: told the number of prompts answered on this rank, for a progress bar.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    max_tokens: int
    peers: Peers
    advance: Callable[[int], None] = lambda count: None

    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        """Answers in the order of ``prompts``, the same on all ranks; all call this together."""
        mine: dict[int, str] = {}
        ranks = self.peers.world_size
        for sampling, batches in self._plan(prompts).items():
            for begin in range(0, len(batches), ranks):
                round_ = batches[begin : begin + ranks]
                here = round_[self.peers.rank] if self.peers.rank < len(round_) else []
                mine.update(self._run([prompts[i] for i in here], here, sampling))
                self.advance(len(here))
        found: dict[int, str] = {}
        for part in self.peers.gather_objects(mine):
            found.update(part)
        return [found[index] for index in range(len(prompts))]

    def _plan(self, prompts: Sequence[Prompt]) -> dict[Sampling, list[list[int]]]:
        """Batches of prompts that are sampled alike, similar lengths together, longest first."""
        batches: dict[Sampling, list[list[int]]] = {}
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].tokens), reverse=True)
        for index in order:
            sampling = prompts[index].sampling
            group = batches.setdefault(sampling, [[]])
            longest = len(prompts[group[-1][0]].tokens) if group[-1] else 0
            rows = len(group[-1]) + 1
            full = rows * (longest + sampling.max_new_tokens) > self.max_tokens
            if group[-1] and (full or rows > MAX_ROWS):
                group.append([])
            group[-1].append(index)
        return batches

    def _run(
        self, prompts: Sequence[Prompt], indices: Sequence[int], sampling: Sampling
    ) -> dict[int, str]:
        answers = [Answer(self.tokenizer, prompt.tokens, prompt.stops) for prompt in prompts]

        def finished(new: NewToken) -> bool:
            return answers[new.sequence].push(new.token)

        tokens = stream(
            self.model,
            [list(prompt.tokens) for prompt in prompts],
            sampling,
            eos_id=self.tokenizer.eos_id,
            vocab_size=self.tokenizer.vocab_size,
            finished=finished,
            peers=self.peers,
        )
        for _ in tokens:
            pass
        return {index: answer.text() for index, answer in zip(indices, answers)}
