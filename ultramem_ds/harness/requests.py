"""What is asked of a model, in token ids, and what is cut to fit its length.

A log-likelihood request is a context and a continuation: the model reads both but for the last
token, and every token of the continuation is scored at the position before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

Tokens = Sequence[int]


@dataclass(frozen=True)
class Request:
    """Score ``continuation`` after ``context``, both at least one token long."""

    context: Tokens
    continuation: Tokens


@dataclass(frozen=True)
class Score:
    """Answer to a :class:`Request`.

    Attributes:
        logprob: of the continuation, nats, summed over its tokens.
        is_greedy: whether every token of it is the most likely one.
    """

    logprob: float
    is_greedy: bool


@dataclass
class Cuts:
    """Requests that were too long for the model, by task: counted, never silent.

    Attributes:
        asked: all requests.
        truncated: requests that lost the beginning of their context.
        shortened: generations that were allowed fewer tokens than the task asks for.
    """

    asked: Counter[str] = field(default_factory=Counter)
    truncated: Counter[str] = field(default_factory=Counter)
    shortened: Counter[str] = field(default_factory=Counter)

    def fit(self, task: str, request: Request, max_length: int) -> Request:
        """The end of ``request`` that a model which reads ``max_length`` tokens can score.

        Raises:
            ValueError: the continuation alone is longer.
        """
        self.asked[task] += 1
        excess = len(request.context) + len(request.continuation) - 1 - max_length
        if excess <= 0:
            return request
        if excess >= len(request.context):
            raise ValueError(
                f"{task}: an answer of {len(request.continuation)} tokens does not fit the model's "
                f"{max_length}; give --max-length a larger number"
            )
        self.truncated[task] += 1
        return Request(request.context[excess:], request.continuation)

    def fit_prompt(
        self, task: str, prompt: Tokens, max_new_tokens: int, max_length: int
    ) -> tuple[Tokens, int]:
        """The end of a prompt that leaves room, and the tokens that may be generated.

        A task that wants as many tokens as the model can hold, or more, gets half of them.
        """
        self.asked[task] += 1
        if max_new_tokens >= max_length:
            self.shortened[task] += 1
            max_new_tokens = max(1, max_length // 2)
        room = max_length - max_new_tokens
        if len(prompt) > room:
            self.truncated[task] += 1
            prompt = prompt[len(prompt) - room :]
        return prompt, max_new_tokens
