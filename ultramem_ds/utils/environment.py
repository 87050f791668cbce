"""What a launcher sets in the environment."""

from __future__ import annotations

import os


def world_size() -> int:
    """``WORLD_SIZE``, ranks of the job; 1 without a launcher.

    Raises:
        ValueError: it is no positive number.
    """
    return _integer("WORLD_SIZE", default=1, least=1)


def rank() -> int:
    """``RANK``, this process's number in the job; 0 without a launcher.

    Raises:
        ValueError: it is no number from 0 on.
    """
    return _integer("RANK", default=0, least=0)


def speaks() -> bool:
    """Whether this process says what it refuses: not if a launcher numbered it above 0."""
    number = os.environ.get("RANK", "0")
    return not number.isdigit() or int(number) == 0


def _integer(name: str, default: int, least: int) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    if not text.isdigit() or int(text) < least:
        raise ValueError(
            f"{name}={text!r} in the environment must be a whole number from {least} on; a "
            "launcher sets it, unset it to run one process"
        )
    return int(text)
