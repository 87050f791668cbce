"""What this process is doing and for how long: for metrics, the watchdog and error reports."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

START = "start"
OTHER = "other"  # of a step, outside any phase


class Phases:
    """The current phase of this process and the seconds each phase took.

    Phases nest; the time of an inner one is not counted for the outer. Other threads may read
    ``current``, ``since`` and ``step`` at any moment.

    Attributes:
        current: name of the innermost open phase.
        since: ``time.monotonic()`` at which it was entered (or come back to).
        step: optimizer step in progress, counted from 1.
        first_step: the first one of this process, 0 before it.
    """

    def __init__(self) -> None:
        self.current = START
        self.since = time.monotonic()
        self.step = 0
        self.first_step = 0
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Be in phase ``name`` while the block runs; an exception leaves ``current`` as it was."""
        outer = self.current
        self._switch(name)
        yield
        self._switch(outer)

    def begin_step(self, step: int) -> None:
        """Call before optimizer step ``step``, counted from 1, outside any phase."""
        self.step = step
        self.first_step = self.first_step or step
        if self.current == START:
            self._switch(OTHER)

    def _switch(self, name: str) -> None:
        now = time.monotonic()
        self._seconds[self.current] = self._seconds.get(self.current, 0.0) + now - self.since
        self.current, self.since = name, now

    def take_seconds(self) -> dict[str, float]:
        """Seconds per phase since the last call, the open one included."""
        self._switch(self.current)
        seconds, self._seconds = self._seconds, {}
        return seconds
