"""Run the command line as people do: through ``launch/one_node.sh`` or as one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT_TO_DROP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def environment(**extra: str) -> dict[str, str]:
    """This environment without a rendezvous, one thread per process."""
    kept = {k: v for k, v in os.environ.items() if k not in ENVIRONMENT_TO_DROP}
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHON": sys.executable, **extra}


def run_verb(
    *arguments: str, nproc: int = 0, timeout_s: float = 300.0, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Run ``ultramem_ds`` with ``arguments``: ``nproc`` launched ranks, or plain Python for 0."""
    if nproc:
        command = ["bash", str(ROOT / "launch" / "one_node.sh"), *arguments]
        extra["NPROC"] = str(nproc)
    else:
        command = [sys.executable, "-m", "ultramem_ds", *arguments]
    return subprocess.run(
        command,
        env=environment(**extra),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def run_module(
    module: str, *arguments: str, nproc: int, timeout_s: float = 300.0
) -> subprocess.CompletedProcess[str]:
    """Run another module on ``nproc`` ranks of the ``deepspeed`` launcher."""
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(nproc)]
    command += ["--no_local_rank", "--master_addr", "127.0.0.1", "--master_port", str(port)]
    command += ["--module", module, *arguments]
    result = subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=timeout_s
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return result
