"""One rank's end is every rank's end, soon and with a reason: failures, deaths, hangs, orphans.

A :class:`Watchdog` is the frame of a training run on each rank:

- *Failure.* An exception leaves the frame: the first rank to fail says who, where and why, in the
  log and in ``alarm.json`` (see ``roster``); every rank's thread sees that file and ends its
  process. A rank that lost its peers (one was killed) looks for the dead one and names it.
- *Hang.* A rank whose phase has not changed for ``train.watchdog_s`` raises the alarm; every rank
  writes its phase and Python stacks, the first one prints a table of all, and the job ends.
- *Orphans.* A rank whose launcher is gone sends itself SIGTERM, which saves and ends a run, and
  ends in any case a minute later.

Nothing here is a collective, and nothing needs the main thread. ``os._exit`` is the only way out of
a process whose main thread waits in a collective; loader workers are killed before.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType

import psutil

from ultramem_ds.sharding.comm import is_lost_connection
from ultramem_ds.telemetry.phases import Phases
from ultramem_ds.utils.processes import is_alive, kill_children, launchers_above, wait_until
from ultramem_ds.watch.faultlog import log_fault
from ultramem_ds.watch.roster import Alarm, Presence, Roster
from ultramem_ds.zero.runtime import Ranks

EXIT_FAILED = 1  # an unexpected error, or a rank that died
EXIT_REFUSED = 2  # an expected one: bad input, too many bad steps, ranks that differ
EXIT_HANG = 3
EXIT_ORPHANED = 4

POLL_S = 1.0  # between two looks at launcher and alarm
SIGN_S = 2.0  # between two signatures in the roster, for up to 64 ranks
ORPHAN_S = 60.0  # for a rank without a launcher to save and end
SAY_S = 20.0  # for the rank that raised the alarm to say why, on a machine that is busy
GRACE_S = 5.0  # for other ranks to write their stacks, or to say why they end
# Beyond train.watchdog_s: what is slow without being stuck.
START_S = 1800.0  # building or loading model and kernels, before the first step
FIRST_STEP_S = 600.0  # autotuning, allocation, the loader's first batches
LONG_PHASE_S = {"validate": 1800.0, "tasks": 7200.0, "save": 1800.0, "rollback": 1800.0}


def allowed_s(watchdog_s: float, phase: str, step: int, first_step: int) -> float:
    """Seconds that a rank may stay in ``phase`` of ``step``, which is 0 before ``first_step``."""
    extra = LONG_PHASE_S.get(phase, 0.0)
    if step == 0:
        extra = max(extra, START_S)
    elif step == first_step:
        extra = max(extra, FIRST_STEP_S)
    return watchdog_s + extra


class Watchdog:
    """Context manager around what a rank does from joining the job on.

    Args:
        run_dir: the run directory.
        job: this start's name, from ``Roster.reset``.
        ranks: where this process stands.
        phases: what it is doing.
        watchdog_s: ``train.watchdog_s``.
    """

    def __init__(
        self, run_dir: Path, job: str, ranks: Ranks, phases: Phases, watchdog_s: float
    ) -> None:
        self._run_dir = run_dir
        self._ranks = ranks
        self._phases = phases
        self._watchdog_s = watchdog_s
        self._roster = Roster(run_dir, job, ranks.rank, phases)
        self._launchers = launchers_above()
        self._orphaned_at = math.inf
        self._suspended_s = 0.0
        self._since = phases.since
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        faulthandler.enable()
        # At C level: works while the main thread holds the interpreter.
        self._stacks = open(self._roster.stack_file, "w")
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        self._roster.sign()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _: TracebackType | None,
    ) -> None:
        if error is not None and not isinstance(error, SystemExit):
            self._fail(error)
        self._ended.set()
        self._thread.join()
        faulthandler.unregister(signal.SIGUSR2)
        self._stacks.close()

    # --- failures, in the main thread

    def _fail(self, error: BaseException) -> None:
        """Report, and end this process unless it is the only one."""
        expected = isinstance(error, ValueError | OSError | KeyboardInterrupt)
        here = self._roster.here()
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        text = f"rank {here.rank} failed at {here.where()}: {reason}"
        if is_lost_connection(error):
            expected = True
            lost = f"rank {here.rank} lost its peers at {here.where()}"
            # Who failed says so itself; who was killed cannot.
            if wait_until(self._something_is_wrong, GRACE_S):
                text = "; ".join([*(f"{_described(p)} died" for p in self._dead()), lost])
            else:
                text = f"{lost} ({reason.splitlines()[0]})"
        if not expected:
            text += "\n" + "".join(traceback.format_exception(error)).rstrip()
        code = EXIT_REFUSED if isinstance(error, ValueError | OSError) else EXIT_FAILED
        try:
            first = self._roster.raise_alarm("failure", code, text)
        except OSError:  # a full disk: say it all the same
            first = True
        if self._ranks.world_size == 1:
            details = {"rank": here.rank, "step": here.step, "phase": here.phase}
            with contextlib.suppress(OSError):  # a full disk: the error itself is what to say
                log_fault(self._run_dir, "failure", text if not expected else "", **details)
            return
        alarm = self._roster.alarm()
        if first or alarm is None:
            self._end("failure", f"error: {text}", code)
        else:
            self._end("failure", self._unsaid(alarm), alarm.code)

    def _something_is_wrong(self) -> bool:
        return self._roster.alarm() is not None or bool(self._dead())

    def _dead(self) -> list[Presence]:
        return [other for other in self._roster.others() if other.state() == "dead"]

    # --- everything else, in the thread

    def _watch(self) -> None:
        poll_s = min(POLL_S, self._watchdog_s / 4 or POLL_S)
        sign_s = SIGN_S * max(1.0, self._ranks.world_size / 64)
        signed = looked = time.monotonic()
        while not self._ended.wait(poll_s):
            now = time.monotonic()
            if now - looked > GRACE_S + poll_s:  # the whole process was stopped meanwhile
                self._suspended_s += now - looked
            looked = now
            self._look_for_launcher(now)
            alarm = self._roster.alarm()
            if alarm is not None:
                self._follow(alarm)
            if now - signed > sign_s:
                with contextlib.suppress(OSError):  # a full disk: tried again
                    self._roster.sign()
                signed = now
            self._look_for_hang(now)

    def _look_for_launcher(self, now: float) -> None:
        if self._orphaned_at == math.inf:
            if all(is_alive(launcher) for launcher in self._launchers):
                return
            self._orphaned_at = now
            here = self._roster.here()
            text = f"rank {here.rank} ends: its launcher is gone (at {here.where()})"
            try:
                log_fault(self._run_dir, "orphaned", text, rank=here.rank, step=here.step)
            except OSError:  # so is the reader of the log: do not let a line of output fail
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, 1)
                os.dup2(nowhere, 2)
            os.kill(os.getpid(), signal.SIGTERM)
        elif now - self._orphaned_at > ORPHAN_S:
            self._end("orphaned", "", EXIT_ORPHANED)

    def _follow(self, alarm: Alarm) -> None:
        """Another rank has raised the alarm."""
        if alarm.kind == "hang":
            self._dump()
            self._ended.wait(GRACE_S + 3 * POLL_S)  # who raised it shall print, and end first
        else:  # a failing main thread says why by itself; one that waits for a peer cannot
            self._ended.wait(GRACE_S)
        self._end(alarm.kind, self._unsaid(alarm), alarm.code)

    def _unsaid(self, alarm: Alarm) -> str:
        """What the rank that raised the alarm was to say, if it ended before it could."""
        raiser = next((p for p in self._roster.others() if p.rank == alarm.rank), None)
        wait_until(
            lambda: self._roster.was_said() or (raiser is not None and raiser.state() == "dead"),
            SAY_S,
        )
        return f"error: {alarm.text}" if self._roster.mark_said() else ""

    def _look_for_hang(self, now: float) -> None:
        phases = self._phases
        if phases.since != self._since:
            self._since, self._suspended_s = phases.since, 0.0
        limit_s = allowed_s(self._watchdog_s, phases.current, phases.step, phases.first_step)
        stuck_s = now - self._since - self._suspended_s
        if not self._watchdog_s or stuck_s <= limit_s:
            return
        text = (
            f"watchdog: rank {self._ranks.rank} has been at {self._roster.here().where()} for "
            f"{stuck_s:.0f} s (train.watchdog_s={self._watchdog_s:g}, {limit_s:g} s for this phase)"
        )
        with contextlib.suppress(OSError):  # a full disk: this rank at least ends
            if not self._roster.raise_alarm("hang", EXIT_HANG, text):
                return  # another rank was faster: its alarm is seen at the next look
        self._dump()
        others = self._roster.others()
        wait_until(lambda: all(self._answered(other) for other in others), GRACE_S)
        lines = [text, f"  {_described(self._roster.here())}: raised the alarm"]
        for other in others:
            answered = self._answered(other)
            if not answered:  # holds the interpreter, or is stopped
                process = other.process()
                if process is not None:
                    with contextlib.suppress(psutil.Error):
                        process.send_signal(signal.SIGUSR2)
            state = "" if answered else f", no answer ({other.state()})"
            lines.append(f"  {_described(other)} when last seen{state}")
        time.sleep(POLL_S)
        for rank in range(self._ranks.world_size):
            path = self._roster.stack_file.with_name(f"stack-{rank:05d}.txt")
            stack = path.read_text().strip() if path.exists() else ""
            lines.append(f"Python stacks of rank {rank}:\n{stack or '(none)'}")
        for other in others:
            process = None if self._answered(other) else other.process()
            if process is not None:
                with contextlib.suppress(psutil.Error):
                    process.kill()
                lines.append(f"killed rank {other.rank}, which did not answer")
        self._end("hang", "\n".join(lines), EXIT_HANG)

    def _answered(self, other: Presence) -> bool:
        path = self._roster.stack_file.with_name(f"stack-{other.rank:05d}.txt")
        return path.exists() and path.stat().st_size > 0

    def _dump(self) -> None:
        with contextlib.suppress(OSError):
            self._roster.sign()
        here = self._roster.here()
        self._stacks.write(f"{_described(here)}, for {here.seconds:.0f} s\n")
        self._stacks.flush()
        faulthandler.dump_traceback(self._stacks, all_threads=True)

    def _end(self, kind: str, text: str, code: int) -> None:
        """Say why, once per job, and leave without waiting for anything."""
        here = self._roster.here()
        if text:
            with contextlib.suppress(OSError, ValueError):  # the log may be gone with the launcher
                log_fault(
                    self._run_dir, kind, text, rank=here.rank, step=here.step, phase=here.phase
                )
            self._roster.mark_said()
        kill_children()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _described(presence: Presence) -> str:
    return f"rank {presence.rank} (pid {presence.pid} on {presence.host}) at {presence.where()}"
