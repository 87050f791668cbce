"""Where a lookup's chain of exchanges and reads runs while the model's blocks compute.

Three executors behind one interface; which one is a setting, the results are the same bits.
"""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

Work: TypeAlias = Callable[[], Tensor]
Clock: TypeAlias = Callable[[str], AbstractContextManager[None]]  # runs while a named phase lasts

LOOKUP = "lookup"  # the phase of everything here
IDLE_S = 60.0  # for an idle worker to end
STUCK_S = 1.0  # for one whose work waits for ranks that may be gone


def no_clock(phase: str) -> AbstractContextManager[None]:
    """For callers that do not ask how long things take."""
    return nullcontext()


class Job(Protocol):
    """Work handed to an executor."""

    def result(self) -> Tensor:
        """Waits for the work; its result, or its error raised."""


class Executor(Protocol):
    """Runs work one piece after the other, in the order submitted: the same on all ranks."""

    def submit(self, work: Work) -> Job:
        """Starts ``work``, at once or behind what was submitted before."""


@dataclass(frozen=True)
class DoneJob:
    """A job that ran inside ``submit``."""

    value: Tensor

    def result(self) -> Tensor:
        """The value."""
        return self.value


class InlineExecutor:
    """Synchronous: the work is over when ``submit`` returns."""

    def submit(self, work: Work) -> DoneJob:
        """Runs ``work`` now."""
        return DoneJob(work())


class ThreadExecutor:
    """One worker thread, for CPU ranks: gloo waits and table reads leave the interpreter free.

    The thread is a daemon: a rank that fails elsewhere can exit although its worker still waits in
    a collective for the others. An idle one ends before the interpreter does, however late a busy
    machine lets it run: a thread that is still there then aborts the process.
    """

    def __init__(self) -> None:
        self._working = False
        self._queue: queue.SimpleQueue[tuple[Work, Future[Tensor]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="table-lookups", daemon=True)
        self._thread.start()
        atexit.register(self._end)

    def _end(self) -> None:
        self._queue.put(None)
        self._thread.join(timeout=STUCK_S if self._working else IDLE_S)

    def submit(self, work: Work) -> Future[Tensor]:
        """Queues ``work``."""
        future: Future[Tensor] = Future()
        self._queue.put((work, future))
        return future

    def _serve(self) -> None:
        while (item := self._queue.get()) is not None:
            work, future = item
            self._working = True
            try:
                value = work()
            except BaseException as error:  # raised again where the result is asked for
                self._working = False
                future.set_exception(error)
            else:
                self._working = False
                future.set_result(value)
                del value
            # An idle worker must not keep the last lookup's tensors alive.
            del item, work, future


class StreamExecutor:
    """One side stream, for CUDA ranks: kernels and NCCL run beside the current stream's.

    The host sync on the counts of an exchange still happens inside ``submit``.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def submit(self, work: Work) -> StreamJob:
        """Launches ``work`` behind everything that the current stream has been given."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            value = work()
            return StreamJob(value, self._stream.record_event(), work)


@dataclass(frozen=True)
class StreamJob:
    """Work under way on a side stream.

    Holding ``work`` keeps its inputs, memory of the current stream, from being reused meanwhile.
    """

    value: Tensor
    done: torch.cuda.Event
    work: Work

    def result(self) -> Tensor:
        """Makes the current stream wait, not the host."""
        current = torch.cuda.current_stream()
        current.wait_event(self.done)
        self.value.record_stream(current)
        return self.value


@dataclass(frozen=True)
class ClockedExecutor:
    """Another executor, with the caller's time in it on a clock.

    That is all of the work if it is synchronous, and else handing it over and waiting for it; on
    CUDA launching it and the exchange's host sync.
    """

    inner: Executor
    clock: Clock

    def submit(self, work: Work) -> Job:
        """Starts ``work``."""
        with self.clock(LOOKUP):
            return ClockedJob(self.inner.submit(work), self.clock)


@dataclass(frozen=True)
class ClockedJob:
    """Work handed to a :class:`ClockedExecutor`."""

    inner: Job
    clock: Clock

    def result(self) -> Tensor:
        """Waits for the work."""
        with self.clock(LOOKUP):
            return self.inner.result()


def make_executor(asynchronous: bool, device: torch.device) -> Executor:
    """The executor for ``memory.async_lookup`` on ``device``."""
    if not asynchronous:
        return InlineExecutor()
    return StreamExecutor(device) if device.type == "cuda" else ThreadExecutor()
