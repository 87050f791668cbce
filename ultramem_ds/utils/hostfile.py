"""Hostfiles: a line per machine, ``worker-1 slots=8``."""

from __future__ import annotations

import re
from pathlib import Path

_LINE = re.compile(r"(?P<host>[^\s=]+)\s+slots\s*=\s*(?P<slots>\d+)")


def read_hostfile(path: Path) -> dict[str, int]:
    """Machines and the ranks that each takes, in the order of the file.

    Raises:
        ValueError: it is missing or empty, a line is none, or a machine stands there twice.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise ValueError(
            f"hostfile {path} does not exist; a line for each machine: worker-1 slots=8"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"hostfile {path} cannot be read: {error}") from None
    return parse_hostfile(text, str(path))


def parse_hostfile(text: str, name: str) -> dict[str, int]:
    """The machines of a hostfile's ``text``; ``name`` is for messages.

    Raises:
        ValueError: see :func:`read_hostfile`.
    """
    hosts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        match = _LINE.fullmatch(entry)
        if match is None or int(match["slots"]) == 0:
            raise ValueError(
                f"hostfile {name}, line {number}: {entry!r} is not a machine and its ranks; write "
                f"{entry.split()[0]} slots=8"
            )
        if match["host"] in hosts:
            raise ValueError(
                f"hostfile {name}, line {number}: {match['host']} stands there twice; write it "
                "once, with all its slots"
            )
        hosts[match["host"]] = int(match["slots"])
    if not hosts:
        raise ValueError(f"hostfile {name} names no machine; a line for each: worker-1 slots=8")
    return hosts
