"""A run that the launcher started, watched from outside: its processes, its files, its end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from ultramem_ds.utils.processes import wait_until

MARK = "ULTRAMEM_TEST_MARK"
_RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Job:
    """``train`` on several ranks of this machine, under :mod:`ultramem_ds.testing.faults`.

    Every process of it, children's children too, is known by a mark in its environment.

    Args:
        arguments: of ``train``, with ``--run-dir``.
        run_dir: the same directory; the output goes to a file beside it.
        nproc: ranks.
        faults: the plan.
        done_dir: where faults that happened leave a file, None to let them happen at every start.
        launcher: module that starts the ranks.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        run_dir: Path,
        *,
        nproc: int = 2,
        faults: str = "",
        done_dir: Path | None = None,
        launcher: str = "ultramem_ds.launcher",
    ) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        self.mark = f"{run_dir}-{port}"
        self.run_dir = run_dir
        self.log = run_dir.with_name(f"{run_dir.name}-{port}.log")
        command = [sys.executable, "-m", launcher, "--num_gpus", str(nproc), "--no_local_rank"]
        command += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
        command += ["--module", "ultramem_ds.testing.faults", "train", *arguments]
        environment = {k: v for k, v in os.environ.items() if k not in _RENDEZVOUS}
        environment |= {"OMP_NUM_THREADS": "1", "ULTRAMEM_FAULTS": faults, MARK: self.mark}
        # The package of this file, wherever the caller stands.
        root = str(Path(__file__).resolve().parents[2])
        paths = filter(None, [root, environment.get("PYTHONPATH")])
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        if done_dir is not None:
            done_dir.mkdir(parents=True, exist_ok=True)
            environment["ULTRAMEM_FAULTS_DONE"] = str(done_dir)
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    def output(self) -> str:
        """What was printed so far."""
        return self.log.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """All live processes of the job."""
        found = []
        for process in psutil.process_iter():
            try:
                marked = process.environ().get(MARK) == self.mark
                if marked and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def ended(self, timeout_s: float) -> bool:
        """Whether the launcher and everything below ends in time; the former within it."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return wait_until(lambda: not self.processes(), 20.0)

    def kill(self) -> list[str]:
        """Kill what is left; says what that was."""
        left = self.processes()
        names = [f"{process.pid} {' '.join(process.cmdline())[:200]}" for process in left]
        for process in left:
            process.send_signal(signal.SIGKILL)
        self.process.wait()
        return names

    def _signature(self, rank: int) -> dict[str, Any]:
        mine = {process.pid for process in self.processes()}
        for path in (self.run_dir / "ranks").glob(f"*/rank-{rank:05d}.json"):
            with contextlib.suppress(FileNotFoundError):
                signature: dict[str, Any] = json.loads(path.read_text())
                if signature["pid"] in mine:
                    return signature
        return {"step": 0, "pid": 0}

    def pid_at_step(self, rank: int, step: int, timeout_s: float = 90.0) -> int:
        """Process of ``rank`` as soon as it says that it has come to ``step``; 0 if it never does.

        It says so every few seconds only: it may be further.
        """

        def there() -> bool:
            return self._signature(rank)["step"] >= step or self.process.poll() is not None

        wait_until(there, timeout_s)
        signature = self._signature(rank)
        return int(signature["pid"]) if signature["step"] >= step else 0


def faults_of(run_dir: Path) -> list[dict[str, Any]]:
    """The events of a run's ``faults.jsonl``."""
    path = run_dir / "faults.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
