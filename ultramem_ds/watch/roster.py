"""``RUN/ranks/JOB/``: where every rank says that it lives, and where the first to fail says so.

Files, not messages: they need neither rank 0 nor a collective, and stay readable when everything
has stopped. Every start has a directory of its own and removes those before: what is left of an
earlier job on another node finds its place gone, and can raise no alarm here.

- ``rank-00003.json``: host, process, step and phase, rewritten every few seconds;
- ``alarm.json``: why the job ends, written once, by the rank that noticed first;
- ``said``: that this stands on the console; made after it was printed;
- ``stack-00003.txt``: Python stacks of that rank (also on ``kill -USR2 PID``).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from ultramem_ds.telemetry.phases import Phases
from ultramem_ds.utils.processes import find_process

ALARM = "alarm.json"
SAID = "said"


@dataclass(frozen=True)
class Presence:
    """One rank, as of ``time``."""

    rank: int
    host: str
    pid: int
    created: float  # start time of the process
    step: int
    phase: str
    seconds: float  # since the phase began
    time: float

    def where(self) -> str:
        """Step and phase in words."""
        return f"step {self.step}, phase {self.phase}"

    def process(self) -> psutil.Process | None:
        """The live process, if it runs on this machine."""
        if self.host != socket.gethostname():
            return None
        return find_process(self.pid, self.created)

    def state(self) -> str:
        """Whether it runs, as far as can be seen from here."""
        if self.host != socket.gethostname():
            return f"on {self.host}"
        process = self.process()
        with contextlib.suppress(psutil.Error):
            return "dead" if process is None else process.status()
        return "dead"


@dataclass(frozen=True)
class Alarm:
    """Why a job ends: ``kind`` is failure or hang; every rank exits with ``code``."""

    kind: str
    rank: int
    code: int
    text: str


class Roster:
    """The directory, as one rank uses it.

    Args:
        run_dir: the run directory.
        job: this start's name, from :meth:`reset`.
        rank: this rank.
        phases: what this rank is doing.
    """

    def __init__(self, run_dir: Path, job: str, rank: int, phases: Phases) -> None:
        self.directory = run_dir / "ranks" / job
        self.rank = rank
        self.stack_file = self.directory / f"stack-{rank:05d}.txt"
        self._phases = phases
        self._created = psutil.Process().create_time()

    @staticmethod
    def reset(run_dir: Path) -> str:
        """Forget earlier starts and name this one; one process, before the others come."""
        shutil.rmtree(run_dir / "ranks", ignore_errors=True)
        job = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        (run_dir / "ranks" / job).mkdir(parents=True)
        return job

    def here(self) -> Presence:
        """This rank, now."""
        phases = self._phases
        return Presence(
            rank=self.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            created=self._created,
            step=phases.step,
            phase=phases.current,
            seconds=round(time.monotonic() - phases.since, 1),
            time=time.time(),
        )

    def sign(self) -> None:
        """Write this rank's file."""
        temporary = self.directory / f".rank-{self.rank:05d}"
        temporary.write_text(json.dumps(asdict(self.here())))
        temporary.replace(self.directory / f"rank-{self.rank:05d}.json")

    def others(self) -> list[Presence]:
        """The other ranks that have signed, by rank."""
        found = []
        for path in sorted(self.directory.glob("rank-*.json")):
            with contextlib.suppress(OSError, json.JSONDecodeError):
                presence = Presence(**json.loads(path.read_text()))
                if presence.rank != self.rank:
                    found.append(presence)
        return found

    def raise_alarm(self, kind: str, code: int, text: str) -> bool:
        """Say why the job ends; False if another rank has said so before."""
        content = json.dumps(asdict(Alarm(kind, self.rank, code, text)))
        temporary = self.directory / f".alarm-{self.rank:05d}"
        temporary.write_text(content)
        try:
            os.link(temporary, self.directory / ALARM)  # whole, and only if there is none
        except FileExistsError:
            return False
        return True

    def was_said(self) -> bool:
        """Whether the reason stands on the console."""
        return (self.directory / SAID).exists()

    def mark_said(self) -> bool:
        """It does; False if another rank has marked it before."""
        try:
            (self.directory / SAID).touch(exist_ok=False)
        except OSError:
            return False
        return True

    def alarm(self) -> Alarm | None:
        """What has been said."""
        try:
            return Alarm(**json.loads((self.directory / ALARM).read_text()))
        except (OSError, json.JSONDecodeError):  # not there, or not to be read just now
            return None
