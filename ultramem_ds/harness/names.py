"""Task names as they are typed."""

from __future__ import annotations


def split_names(text: str) -> list[str]:
    """Names separated by commas.

    Raises:
        ValueError: there is none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError("no task is named; `paper` is the group of the paper's ten")
    return names
