"""A hostfile run for real: pdsh and ssh to a server of this machine that stands for two nodes."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import RUN_OVERRIDES
from tests.dist.launching import ROOT, environment, run_verb
from ultramem_ds.telemetry.metrics import read_lines
from ultramem_ds.utils.ports import free_port
from ultramem_ds.utils.processes import wait_until

SSHD = shutil.which("sshd") or shutil.which("/usr/sbin/sshd")

pytestmark = [
    pytest.mark.dist,
    pytest.mark.slow,
    pytest.mark.skipif(
        SSHD is None or shutil.which("pdsh") is None,
        reason="needs openssh-server and pdsh (apt-get install openssh-server pdsh)",
    ),
]


@pytest.fixture
def ssh_path(tmp_path: Path) -> Iterator[str]:
    """PATH with an ``ssh`` that logs in here with a key of its own; the server is real."""
    directory, port = tmp_path / "ssh", free_port()
    directory.mkdir(mode=0o700)
    for name in ("host", "user"):
        make_key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)]
        subprocess.run(make_key, check=True)
    server = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": directory / "host",
        "AuthorizedKeysFile": directory / "user.pub",
        "PidFile": directory / "pid",
        "StrictModes": "no",
        "UsePAM": "no",
        "PermitRootLogin": "prohibit-password",
    }
    (directory / "sshd_config").write_text("".join(f"{k} {v}\n" for k, v in server.items()))
    client = {
        "Port": port,
        "HostName": "127.0.0.1",
        "User": getpass.getuser(),
        "IdentityFile": directory / "user",
        "StrictHostKeyChecking": "no",
        "UserKnownHostsFile": "/dev/null",
        "LogLevel": "ERROR",
    }
    lines = "".join(f"  {key} {value}\n" for key, value in client.items())
    (directory / "ssh_config").write_text(f"Host *\n{lines}")
    wrapper = directory / "bin" / "ssh"
    wrapper.parent.mkdir()
    wrapper.write_text(
        f'#!/bin/sh\nexec {shutil.which("ssh")} -F {directory / "ssh_config"} "$@"\n'
    )
    wrapper.chmod(0o755)
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    assert SSHD is not None
    daemon = subprocess.Popen(
        [SSHD, "-D", "-e", "-f", str(directory / "sshd_config")],
        stderr=open(directory / "log", "wb"),  # noqa: SIM115
    )
    try:
        path = f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}"
        reached = lambda: not subprocess.run(  # noqa: E731
            ["ssh", "here", "true"], env={**os.environ, "PATH": path}, capture_output=True
        ).returncode
        assert wait_until(reached, 30), (directory / "log").read_text()
        yield path
    finally:
        daemon.terminate()
        daemon.wait()


def test_two_machines_of_a_hostfile(prepared: Path, tmp_path: Path, ssh_path: str) -> None:
    """A rank on each; the series is that of one process."""
    words = ["train", "--preset", "dense-debug", "--data", str(prepared), "--run-dir"]
    rest = [*RUN_OVERRIDES, "train.max_steps=2"]
    hosts = tmp_path / "hosts"
    hosts.write_text("# two names of this machine\nlocalhost slots=1\n127.0.0.1 slots=1\n")
    launched = subprocess.run(
        ["bash", str(ROOT / "launch" / "multi_node.sh"), *words, str(tmp_path / "two"), *rest],
        env=environment(HOSTFILE=str(hosts), PATH=ssh_path),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert launched.returncode == 0, launched.stdout[-3000:] + launched.stderr[-3000:]
    assert '"world_size": 2' in (tmp_path / "two" / "summary.json").read_text()
    assert run_verb(*words, str(tmp_path / "one"), *rest).returncode == 0
    one, two = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
