"""Processes that tokenise units, and the progress line that watches them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, TypeAlias

from tqdm import tqdm

from ultramem_ds.data.sources import Unit
from ultramem_ds.data.tokenizers import Tokenizer, load_tokenizer
from ultramem_ds.data.units import Counts, UnitOptions, UnitSummary, tokenize_unit

# A unit and the directory its parts go to.
Job: TypeAlias = tuple[Unit, Path]

_REFRESH_S = 0.5  # time between looks at the counters
_LOG_REFRESH_S = 30.0  # time between progress lines where stderr is a file


class _Stopped(Exception):
    """Another unit failed; this one ends early."""


@dataclass
class _Shared:
    """What parent and workers share."""

    totals: Any  # multiprocessing array of documents, tokens, text bytes
    stop: Event

    def add(self, counts: Counts) -> None:
        """Progress of one batch, from a worker."""
        if self.stop.is_set():
            raise _Stopped
        with self.totals.get_lock():
            self.totals[0] += counts.documents
            self.totals[1] += counts.tokens
            self.totals[2] += counts.text_bytes


@dataclass
class _Worker:
    """State of a worker process, set once by its initializer."""

    tokenizer: Tokenizer
    options: UnitOptions
    shared: _Shared

    def run(self, job: Job) -> UnitSummary:
        unit, directory = job
        return tokenize_unit(unit, self.tokenizer, self.options, directory, self.shared.add)


_worker: _Worker


def _start_worker(tokenizer_path: str, options: UnitOptions, shared: _Shared) -> None:
    global _worker
    _set_single_threaded()
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _worker = _Worker(load_tokenizer(tokenizer_path), options, shared)


def _run_in_worker(job: Job) -> UnitSummary:
    return _worker.run(job)


def _set_single_threaded() -> None:
    """One process is one core: the tokenizer library's own threads would only get in the way."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"


def _exit_with_parent() -> None:
    """A worker whose parent was killed would otherwise wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def run_units(
    jobs: Sequence[Job], tokenizer_path: str, options: UnitOptions, *, workers: int
) -> Generator[tuple[Unit, UnitSummary], None, None]:
    """Tokenise ``jobs`` on ``workers`` processes; yields each unit as it is finished.

    Progress (text MB/s, tokens/s, time left) goes to stderr.

    Raises:
        ValueError: what the first failing unit raised; the others are abandoned.
        ChildProcessError: (an OSError) if a worker was killed, for example for lack of memory.
    """
    context = multiprocessing.get_context("spawn")
    shared = _Shared(context.Array("q", 3), context.Event())
    executor = ProcessPoolExecutor(
        min(workers, len(jobs)),
        mp_context=context,
        initializer=_start_worker,
        initargs=(tokenizer_path, options, shared),
    )
    with _Progress(sum(unit.num_bytes for unit, _ in jobs), shared) as progress:
        try:
            futures = {executor.submit(_run_in_worker, job): job[0] for job in jobs}
            for future in _as_completed(futures, progress):
                unit = futures.pop(future)
                summary = future.result()
                progress.finished(unit)
                yield unit, summary
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a worker process died, perhaps for lack of memory: use fewer --workers; "
                "finished units are kept, repeat the command to go on"
            ) from error
        finally:
            shared.stop.set()
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
        documents, tokens, text_bytes = self._shared.totals[:]
        self._bar.set_postfix_str(
            f"text {text_bytes / elapsed_s / 1e6:.1f} MB/s, {tokens / elapsed_s:,.0f} tokens/s, "
            f"{documents:,} documents",
            refresh=False,
        )
        self._bar.update(0)

    def __exit__(self, *_: object) -> None:
        self.refresh()
        self._bar.close()
