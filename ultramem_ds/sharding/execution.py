"""Where a lookup's chain of exchanges and reads runs while the model's blocks compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

ResultT = TypeVar("ResultT")
ResultT_co = TypeVar("ResultT_co", covariant=True)


class Job(Protocol[ResultT_co]):
    """Work handed to an executor."""

    def result(self) -> ResultT_co:
        """Waits for the work; returns its result or raises its error."""


class Executor(Protocol):
    """Runs jobs one after the other, in the order submitted."""

    def submit(self, work: Callable[[], ResultT]) -> Job[ResultT]:
        """Starts ``work``, at once or behind what was submitted before."""


@dataclass(frozen=True)
class DoneJob(Generic[ResultT]):
    """A job that ran inside ``submit``."""

    value: ResultT

    def result(self) -> ResultT:
        """The value."""
        return self.value


class InlineExecutor:
    """Synchronous: the work is over when ``submit`` returns."""

    def submit(self, work: Callable[[], ResultT]) -> DoneJob[ResultT]:
        """Runs ``work`` now."""
        return DoneJob(work())
