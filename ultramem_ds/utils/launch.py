"""What the scripts of ``launch/`` ask for, checked before anything starts.

Three ways: ranks of this machine (``--num_gpus N``, or the devices of CUDA_VISIBLE_DEVICES),
machines of a hostfile through ssh (``--hostfile FILE``), or this machine's part of several that are
each started by hand or by a scheduler (``--node_rank I --make_hostfile NODES:RANKS``). DeepSpeed
itself takes a missing hostfile, or no ranks at all, for one rank.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ultramem_ds.utils.environment import DEFAULT_PORT
from ultramem_ds.utils.hostfile import read_hostfile
from ultramem_ds.utils.ports import free_port, is_taken


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A launch that can begin.

    Attributes:
        given: arguments for DeepSpeed's runner, but for those below.
        port: where rank 0 listens.
        made_hosts: machines of a hostfile that has to be written, which DeepSpeed wants even where
            it uses no ssh; empty otherwise.
        by_ssh: ranks are started through ssh.
        force_ssh: though the hostfile has one machine: it is another one.
    """

    given: tuple[str, ...]
    port: int
    made_hosts: dict[str, int]
    by_ssh: bool = False
    force_ssh: bool = False

    @property
    def verbose(self) -> bool:
        """Whether the command has ``--verbose``."""
        return "--verbose" in self.given

    @property
    def run_dir(self) -> Path | None:
        """The command's ``--run-dir``."""
        words = [part for word in self.given for part in word.split("=", 1)]
        found = words[words.index("--run-dir") + 1 :] if "--run-dir" in words else []
        return Path(found[0]) if found else None

    def arguments(self, made_hostfile: Path | None) -> list[str]:
        """Of DeepSpeed's runner."""
        hosts = ["--hostfile", str(made_hostfile)] if made_hostfile is not None else []
        force = ["--force_multi"] if self.force_ssh else []
        return [*hosts, *force, "--master_port", str(self.port), *self.given]


def parse_launch(arguments: Sequence[str]) -> Launch:
    """Check a launch.

    Raises:
        ValueError: it would not start as many ranks as it says; what to do about it.
    """
    given = list(arguments)
    port = _take(given, "--master_port")
    nodes_and_ranks = _take(given, "--make_hostfile")
    if nodes_and_ranks is not None:
        nodes, ranks = (
            _count(name, text)
            for name, text in zip(("NNODES", "NPROC"), nodes_and_ranks.split(":", 1))
        )
        node = _count("NODE_RANK", _value(given, "--node_rank"), least=0)
        if node >= nodes:
            raise ValueError(f"NODE_RANK={node} must be below NNODES={nodes}: nodes count from 0")
        alone = nodes == 1
        return Launch(
            given=tuple(given),
            port=_port(port, may_choose=alone, listens_here=node == 0),
            made_hosts={f"node-{i}": ranks for i in range(nodes)},
        )
    if "--hostfile" in given:
        hosts = read_hostfile(Path(_value(given, "--hostfile")))
        first = next(iter(hosts))
        elsewhere = len(hosts) == 1 and not _is_here(first)
        by_ssh = len(hosts) > 1 or elsewhere
        if by_ssh and shutil.which("pdsh") is None:
            raise ValueError(
                "DeepSpeed starts the machines of a hostfile through pdsh, which is not installed "
                "(Debian and Ubuntu: apt-get install pdsh); or start every node by hand with "
                "NODE_RANK, NNODES, MASTER_ADDR and NPROC"
            )
        return Launch(
            given=tuple(given),
            port=_port(port, may_choose=True, listens_here=_is_here(first)),
            made_hosts={},
            by_ssh=by_ssh,
            force_ssh=elsewhere,
        )
    if "--num_gpus" in given:
        _count("NPROC", _value(given, "--num_gpus"))
    return Launch(
        given=tuple(given), port=_port(port, may_choose=True, listens_here=True), made_hosts={}
    )


def _take(given: list[str], option: str) -> str | None:
    """The value of ``option``, which is removed; None where it is missing or empty."""
    if option not in given:
        return None
    at = given.index(option)
    value = given[at + 1]
    del given[at : at + 2]
    return value or None


def _value(given: Sequence[str], option: str) -> str:
    return given[given.index(option) + 1]


def _count(name: str, text: str, least: int = 1) -> int:
    if not text.isdigit() or int(text) < least:
        raise ValueError(f"{name}={text} must be a whole number from {least} on")
    return int(text)


def _port(text: str | None, *, may_choose: bool, listens_here: bool) -> int:
    """The port that was asked for, else a free one or, where others must know it, the default."""
    if text is None and may_choose:
        return free_port()
    port = DEFAULT_PORT if text is None else _count("MASTER_PORT", text)
    if port > 65_535:
        raise ValueError(f"MASTER_PORT={port} must be at most 65535")
    if listens_here and is_taken(port):
        raise ValueError(
            f"port {port} of this machine is taken by another program: set MASTER_PORT to a free "
            "one, the same on all nodes"
        )
    return port


def _is_here(host: str) -> bool:
    """Whether a hostfile's ``host`` is this machine."""
    return host in ("localhost", "127.0.0.1", "::1", socket.gethostname(), socket.getfqdn())
