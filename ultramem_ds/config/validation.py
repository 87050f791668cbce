"""What every section of the configuration checks itself with."""

from __future__ import annotations

from pydantic import ConfigDict

# Unknown keys, NaN and infinity are errors wherever pydantic validates one of these dataclasses.
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


def require(condition: bool, message: str) -> None:
    """Raise ValueError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)
