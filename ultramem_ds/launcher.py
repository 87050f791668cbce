"""Run DeepSpeed's launcher, hand signals on to the ranks, and end as they did.

Usage: ``python -m ultramem_ds.launcher ARGUMENTS`` (``utils/launch.py``), as the scripts in
``launch/`` do.

DeepSpeed's launcher dies of SIGTERM and SIGUSR1 and tells its ranks nothing, or kills them. Here it
runs in a session of its own, out of reach of signals to this process's group, and ignores SIGUSR1.
SIGTERM and SIGUSR1 to this process go to the ranks, SIGINT (Ctrl-C) as SIGTERM. Ranks that train
end after the step in progress, saved, with exit code 0, and so does this process; other verbs end
at once. A second Ctrl-C kills everything.

What DeepSpeed's launcher logs goes to ``RUN/logs/launcher.log`` and not to the console, unless the
command has ``--verbose``.

If a process of DeepSpeed's launcher is killed, the ranks below it are told to stop, given a grace
period, and killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil

from ultramem_ds.utils.console import LOGS, Sorter
from ultramem_ds.utils.launch import Launch, parse_launch

POLL_S = 0.5
REPEAT_S = 5.0  # SIGUSR1 is repeated: a rank that is still importing ignores it
GRACE_S = 60.0  # for ranks without a launcher to save and end
LAST_LINES = 20  # of libraries, where nobody else has said why a launch ended
WORKERS_GRACE_S = 10.0  # for loader workers to notice that their rank has gone


class Launcher:
    """One launch.

    Args:
        launch: checked.
    """

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._hostfile: Path | None = None
        if launch.made_hosts:
            self._hostfile = _write_hostfile(launch.made_hosts)
        self._received: list[int] = []
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._receive)
        environment = {key: value for key, value in os.environ.items() if key != "RANK"}
        self._runner = subprocess.Popen(
            [sys.executable, "-m", "deepspeed.launcher.runner", *launch.arguments(self._hostfile)],
            env=environment,
            start_new_session=True,
            preexec_fn=_ignore_usr1,
            stdout=None if launch.verbose else subprocess.PIPE,
            stderr=None if launch.verbose else subprocess.PIPE,
        )
        self._library_lines: list[bytes] = []
        self._sorters = [
            Sorter(source, console, self._library_lines)
            for source, console in ((self._runner.stdout, 1), (self._runner.stderr, 2))
            if source is not None
        ]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)

    def run(self) -> int:
        """Wait for the end; returns the exit code. An end that nobody has explained is."""
        try:
            code = self._wait()
        finally:
            for sorter in self._sorters:
                sorter.finish(WORKERS_GRACE_S)
            self._keep_library_lines()
            if self._hostfile is not None:
                self._hostfile.unlink()
        if self._is_silent(code):
            said = b"".join(self._library_lines[-LAST_LINES:]).decode(errors="replace")
            print(
                f"error: the ranks ended with exit code {code} and said nothing"
                + (f"; what libraries said last:\n{said.rstrip()}" if said else ""),
                file=sys.stderr,
                flush=True,
            )
        return code

    def _is_silent(self, code: int) -> bool:
        """Whether nobody has said why: stderr tells refusals, stdout the findings of a report."""
        if not code or not self._sorters or self._received:
            return False
        output, errors = self._sorters
        return not errors.shown and (code == 2 or not output.shown)

    def _keep_library_lines(self) -> None:
        """In the run directory, if there came to be one."""
        run_dir = self._launch.run_dir
        if run_dir is not None and run_dir.is_dir() and self._library_lines:
            with contextlib.suppress(OSError):  # a full disk is no reason to end otherwise
                (run_dir / LOGS).mkdir(exist_ok=True)
                with open(run_dir / LOGS / "launcher.log", "ab") as file:
                    file.writelines(self._library_lines)

    def _wait(self) -> int:
        handed_on, repeat_at_s, look_at_s = 0, float("inf"), 0.0
        known: list[psutil.Process] = []
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._runner.wait(POLL_S)
                break
            now_s = time.monotonic()
            new, handed_on = self._received[handed_on:], len(self._received)
            if self._received.count(signal.SIGINT) > 1:
                self._signal_group(signal.SIGKILL)
            elif new or now_s > repeat_at_s:
                self._tell_ranks(new or [signal.SIGUSR1])
                if signal.SIGUSR1 in self._received:
                    repeat_at_s = now_s + REPEAT_S
            if now_s > look_at_s:
                known, look_at_s = self._ranks() or known, now_s + REPEAT_S
        # DeepSpeed's launcher ends after its ranks unless it is killed; its runner says 0 then.
        orphaned = any(map(_runs, known)) and not self._launch.by_ssh
        if orphaned:
            print("the launcher was killed: stopping its ranks", file=sys.stderr, flush=True)
            self._signal_group(signal.SIGTERM)
        self._end_group(GRACE_S if orphaned else WORKERS_GRACE_S)
        return (code if code >= 0 else 128 - code) or int(orphaned)

    def _tell_ranks(self, numbers: Sequence[int]) -> None:
        number = signal.SIGUSR1 if set(numbers) == {signal.SIGUSR1} else signal.SIGTERM
        for rank in self._ranks():
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(number)

    def _ranks(self) -> list[psutil.Process]:
        """The ranks on this machine; one is enough, it tells the others."""
        with contextlib.suppress(psutil.NoSuchProcess):
            below = psutil.Process(self._runner.pid).children(recursive=True)
            if ranks := _top_ranks(below):
                return ranks
        if not self._launch.by_ssh:
            return []
        # Started through ssh: not below this process, but known by the port.
        port = str(self._launch.port)
        mine = psutil.Process().uids().real
        candidates = [p for p in psutil.process_iter() if _uid(p) == mine]
        return [r for r in _top_ranks(candidates) if _environment(r).get("MASTER_PORT") == port]

    def _signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._runner.pid, number)

    def _end_group(self, grace_s: float) -> None:
        """Give what is left of the session, loader workers for instance, its time; then kill it."""
        deadline_s = time.monotonic() + grace_s
        while self._group_lives() and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
        self._signal_group(signal.SIGKILL)

    def _group_lives(self) -> bool:
        try:
            os.killpg(self._runner.pid, 0)
        except ProcessLookupError:
            return False
        # Those that nobody has waited for do not count.
        return any(_group(p) == self._runner.pid and _runs(p) for p in psutil.process_iter())


def _write_hostfile(hosts: dict[str, int]) -> Path:
    with tempfile.NamedTemporaryFile("w", prefix="ultramem-hosts-", delete=False) as file:
        file.writelines(f"{host} slots={slots}\n" for host, slots in hosts.items())
    return Path(file.name)


def _ignore_usr1() -> None:
    """What is ignored stays so in DeepSpeed's processes; the ranks listen again when they train."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _environment(process: psutil.Process) -> dict[str, str]:
    with contextlib.suppress(psutil.Error, OSError):
        return dict(process.environ())
    return {}


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _group(process: psutil.Process) -> int:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        return os.getpgid(process.pid)
    return -1


def _uid(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):
        return int(process.uids().real)
    return -1


def _top_ranks(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those with a rank whose parent has none: no workers that ranks have started."""
    with_rank = {p.pid: p for p in processes if "RANK" in _environment(p)}
    ranks = []
    for process in with_rank.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.ppid() not in with_rank:
                ranks.append(process)
    return ranks


def main(arguments: Sequence[str]) -> int:
    """Launch, or refuse in a line with exit code 2."""
    try:
        launch = parse_launch(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return Launcher(launch).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
