"""A polite request to stop: SIGTERM or SIGUSR1 ends a run after the step in progress, saved.

A signal reaches some ranks, perhaps one. Each rank's request travels with the all-reduce that ends
every step (:class:`Ballot`), so that all ranks stop after the same step.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

import torch
from torch import Tensor

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether this process has been asked to stop.

    Attributes:
        requested: set by the first signal; further ones change nothing.
    """

    def __init__(self) -> None:
        self.requested = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take ``STOP_SIGNALS`` as requests while the block runs; main thread only."""

        def request(number: int, frame: FrameType | None) -> None:
            self.requested = True

        before = {number: signal.signal(number, request) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Ballot:
    """Questions that every rank answers with each step; all of them hear how many said yes.

    Args:
        questions: asked in this order whenever votes are cast.

    Attributes:
        yes: ranks that said yes, by question; of the last count.
    """

    def __init__(self, *questions: Callable[[], bool]) -> None:
        self._questions = questions
        self.yes = [0] * len(questions)

    def cast(self, device: torch.device) -> Tensor:
        """This rank's votes (Q,), to be summed over all ranks."""
        # Filled there: numbers copied from here would keep the host waiting.
        return torch.stack([torch.full((), float(ask()), device=device) for ask in self._questions])

    def count(self, summed: Tensor) -> None:
        """Take the sum over all ranks (Q,)."""
        self.yes = [round(votes) for votes in summed.tolist()]
