"""One checkpoint at a time, written while training waits or while it goes on.

Phases of a save, and who does what:

1. *begin*: rank 0 makes the staging directory; all ranks collect what is to be saved (collectives,
   no files), in the background as a copy in host memory.
2. *write*: each rank writes, fsyncs and describes its own files.
3. *publish*, once all ranks have written: rank 0 records all files and makes the checkpoint the
   latest. A failure anywhere leads here too: rank 0 removes the staging directory, all ranks go on
   with a warning, and the checkpoints before are untouched.

Phases 2 and 3 run in a thread for background saves. The thread calls no collective: whether every
rank has written travels with the votes of a later step (:class:`ultramem_ds.watch.signals.Ballot`),
so that all ranks move on to phase 3 after the same step.
"""

from __future__ import annotations

import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ultramem_ds.checkpoint import directory as checkpoints
from ultramem_ds.checkpoint.host_copies import HostCopies
from ultramem_ds.checkpoint.rank_files import RankFiles
from ultramem_ds.sharding.comm import Comm


class Capturable(Protocol):
    """What can be saved: an engine, seen from the saver."""

    def capture(
        self, directory: Path, tag: str, extra: Mapping[str, Any], copies: HostCopies | None = None
    ) -> RankFiles:
        """This rank's part of checkpoint ``directory/tag``; a collective that writes nothing."""
        ...

    def seal(self, checkpoint: Path) -> None:
        """Record all files; one rank, after all ranks have written theirs."""
        ...


@dataclass
class _Pending:
    """The checkpoint in progress; the same phase on every rank."""

    run_dir: Path
    state: checkpoints.TrainerState
    publishing: bool = False


class Saver:
    """Writes the checkpoints of one engine; all ranks call the same methods in the same order.

    Args:
        checkpoint: the engine's.
        comm: all ranks.
        keep_last: newest checkpoints that stay; 0 = all.
        keep_every: checkpoints of steps divisible by this stay too; 0 = none.
        background: whether training goes on while files are written.

    Attributes:
        failure: why the last save failed; empty if it did not.
    """

    def __init__(
        self,
        checkpoint: Capturable,
        comm: Comm,
        *,
        keep_last: int,
        keep_every: int,
        background: bool,
    ) -> None:
        self.checkpoint = checkpoint
        self.comm = comm
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.failure = ""
        self._copies = HostCopies() if background else None
        self._pending: _Pending | None = None
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None

    @property
    def in_progress(self) -> bool:
        """Whether a checkpoint has been begun and not yet published or given up."""
        return self._pending is not None

    def busy(self) -> bool:
        """Whether this rank is still writing; a vote."""
        return self._thread is not None and self._thread.is_alive()

    def begin(
        self, run_dir: Path, state: checkpoints.TrainerState, extra: Mapping[str, Any]
    ) -> None:
        """Save what the engine holds; done on return unless saves run in the background.

        Args:
            run_dir: the run directory.
            state: what the checkpoint says beside parameters and optimizer state.
            extra: further objects to save on this rank, by file name.
        """
        self.finish()
        directory = checkpoints.checkpoints_dir(run_dir)
        tag = checkpoints.staging_tag(state.step)
        self._pending = _Pending(run_dir, state)
        if self.comm.rank == 0:
            self._attempt(lambda: checkpoints.begin(run_dir, state.step))
        if not self._agreed():
            return
        files = self.checkpoint.capture(directory, tag, extra, self._copies)
        self._start(lambda: files.write(directory / tag))
        if self._copies is None:
            self.finish()

    def advance(self, busy_ranks: int) -> None:
        """After a step: move on if no rank was still writing when votes were cast."""
        if self._pending is not None and busy_ranks == 0:
            self._next_phase()

    def finish(self) -> None:
        """Wait until nothing is in progress any more."""
        while self._pending is not None:
            self._next_phase()

    def _next_phase(self) -> None:
        """Wait for the phase in progress on all ranks, then begin the next."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        pending = self._pending
        assert pending is not None
        if not self._agreed():
            return
        if pending.publishing:
            self._pending = None
            self.failure = ""
            return
        pending.publishing = True
        if self.comm.rank == 0:
            self._start(
                lambda: checkpoints.publish(
                    pending.run_dir,
                    pending.state,
                    self.checkpoint.seal,
                    self.keep_last,
                    self.keep_every,
                )
            )

    def _start(self, work: Callable[[], object]) -> None:
        if self._copies is None:
            self._attempt(work)
            return
        # Not a daemon: a process that ends normally ends after its checkpoint.
        self._thread = threading.Thread(target=self._attempt, args=(work,), name="checkpoint")
        self._thread.start()

    def _attempt(self, work: Callable[[], object]) -> None:
        """Run one phase's work; what it raises is agreed upon with the other ranks later."""
        try:
            work()
        except OSError as error:
            self._error = error
        except Exception as error:  # must not end a thread unseen
            traceback.print_exc()
            self._error = OSError(f"{type(error).__name__}: {error}")

    def _agreed(self) -> bool:
        """Whether the phase succeeded on all ranks; else the save is given up on all of them."""
        try:
            with self.comm.raising_together(OSError):
                error, self._error = self._error, None
                if error is not None:
                    raise error
        except OSError as error:
            self._give_up(str(error))
            return False
        return True

    def _give_up(self, reason: str) -> None:
        pending, self._pending = self._pending, None
        assert pending is not None
        self.failure = f"checkpoint of step {pending.state.step} could not be saved: {reason}"
        if self.comm.rank != 0:
            return
        self._attempt(lambda: checkpoints.abandon(pending.run_dir))
        self._error = None  # the next save sweeps again
        good = checkpoints.resume_candidates(pending.run_dir)
        free_mb = shutil.disk_usage(pending.run_dir).free / 1e6
        print(
            f"WARNING: {self.failure}. {free_mb:,.0f} MB are free in {pending.run_dir}. Training "
            f"goes on; the last good checkpoint is {good[0].name if good else 'none yet'}",
            file=sys.stderr,
            flush=True,
        )
