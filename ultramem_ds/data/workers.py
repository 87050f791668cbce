"""Processes that tokenise units, and the progress line that watches them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import TypeAlias

from tqdm import tqdm

from ultramem_ds.data.tokenizers import Tokenizer
from ultramem_ds.data.unit import Unit
from ultramem_ds.data.units import Counts, UnitOptions, UnitSummary, tokenize_unit

# A unit and the directory its parts go to.
Job: TypeAlias = tuple[Unit, Path]

# Loads the tokenizer anew in every process.
TokenizerLoader: TypeAlias = Callable[[], Tokenizer]

# One process is one core: the tokenizer library's own threads would only get in the way.
_SINGLE_THREADED = {"TOKENIZERS_PARALLELISM": "false"}

_REFRESH_S = 0.5  # time between looks at the counters
_LOG_REFRESH_S = 30.0  # time between progress lines where stderr is a file


class _Stopped(Exception):
    """Another unit failed; this one ends early."""


class _Shared:
    """What the parent and its workers share."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._totals = context.Array("q", 3)
        self._stop = context.Event()

    def add(self, counts: Counts) -> None:
        """Progress of one batch."""
        if self._stop.is_set():
            raise _Stopped
        with self._totals.get_lock():
            for place, value in enumerate((counts.documents, counts.tokens, counts.text_bytes)):
                self._totals[place] += value

    def totals(self) -> Counts:
        """Progress of all workers together."""
        documents, tokens, text_bytes = self._totals[:]
        return Counts(documents=documents, tokens=tokens, text_bytes=text_bytes)

    def stop(self) -> None:
        """Make every worker end at its next batch."""
        self._stop.set()


_run_job: Callable[[Job], UnitSummary]  # of a worker process, set once by its initializer


def _start_worker(load: TokenizerLoader, options: UnitOptions, shared: _Shared) -> None:
    global _run_job
    os.environ.update(_SINGLE_THREADED)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    tokenizer = load()

    def run(job: Job) -> UnitSummary:
        unit, directory = job
        return tokenize_unit(unit, tokenizer, options, directory, shared.add)

    _run_job = run


def _run_in_worker(job: Job) -> UnitSummary:
    return _run_job(job)


def _exit_with_parent() -> None:
    """A worker whose parent was killed would otherwise wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def run_units(
    jobs: Sequence[Job], load: TokenizerLoader, options: UnitOptions, *, workers: int
) -> Generator[tuple[Unit, UnitSummary], None, None]:
    """Tokenise ``jobs``; yields each unit as it is finished.

    One worker is this process; more are processes of their own. Progress (text MB/s, tokens/s,
    time left) goes to stderr.

    Raises:
        ValueError: what the first failing unit raised; the others are abandoned.
        OSError: likewise, and if a worker was killed, for example for lack of memory.
    """
    shared = _Shared()
    run = _run_here if workers == 1 else partial(_run_in_processes, workers=min(workers, len(jobs)))
    with _Progress(sum(unit.num_bytes for unit, _ in jobs), shared) as progress:
        for unit, summary in run(jobs, load, options, shared, progress):
            progress.finished(unit)
            yield unit, summary


def _run_here(
    jobs: Sequence[Job],
    load: TokenizerLoader,
    options: UnitOptions,
    shared: _Shared,
    progress: _Progress,
) -> Iterator[tuple[Unit, UnitSummary]]:
    tokenizer = load()

    def add(counts: Counts) -> None:
        shared.add(counts)
        progress.refresh()

    before = {name: os.environ.get(name) for name in _SINGLE_THREADED}
    os.environ.update(_SINGLE_THREADED)
    try:
        for unit, directory in jobs:
            yield unit, tokenize_unit(unit, tokenizer, options, directory, add)
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            os.environ.update({name: value} if value is not None else {})


def _run_in_processes(
    jobs: Sequence[Job],
    load: TokenizerLoader,
    options: UnitOptions,
    shared: _Shared,
    progress: _Progress,
    *,
    workers: int,
) -> Iterator[tuple[Unit, UnitSummary]]:
    executor = ProcessPoolExecutor(
        workers,
        # Not fork: the caller may have threads, and the tokenizer library has its own.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(load, options, shared),
    )
    try:
        futures = {executor.submit(_run_in_worker, job): job[0] for job in jobs}
        for future in _as_completed(futures, progress):
            yield futures.pop(future), future.result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a worker process died, perhaps for lack of memory: use fewer --workers; "
            "finished units are kept, repeat the command to go on"
        ) from error
    finally:
        shared.stop()
        executor.shutdown(cancel_futures=True)


def _as_completed(
    futures: dict[Future[UnitSummary], Unit], progress: _Progress
) -> Iterator[Future[UnitSummary]]:
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=_REFRESH_S, return_when=FIRST_COMPLETED)
        progress.refresh()
        yield from done


class _Progress(contextlib.AbstractContextManager["_Progress"]):
    """One line on stderr: input read, text MB/s, tokens/s, time left."""

    def __init__(self, total_bytes: int, shared: _Shared) -> None:
        self._shared = shared
        self._begin_s = time.monotonic()
        self._bar = tqdm(
            total=total_bytes,
            unit="B",
            unit_scale=True,
            desc="prepare",
            file=sys.stderr,
            mininterval=_REFRESH_S if sys.stderr.isatty() else _LOG_REFRESH_S,
        )

    def finished(self, unit: Unit) -> None:
        """Count a finished unit's input."""
        self._bar.update(unit.num_bytes)

    def refresh(self) -> None:
        """Show the rates of now."""
        elapsed_s = max(time.monotonic() - self._begin_s, 1e-9)
        totals = self._shared.totals()
        self._bar.set_postfix_str(
            f"text {totals.text_bytes / elapsed_s / 1e6:.1f} MB/s, "
            f"{totals.tokens / elapsed_s:,.0f} tokens/s, {totals.documents:,} documents",
            refresh=False,
        )
        self._bar.update(0)

    def __exit__(self, *_: object) -> None:
        self.refresh()
        self._bar.close()
