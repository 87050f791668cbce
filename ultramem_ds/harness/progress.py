"""A bar on standard error while requests are answered."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from tqdm import tqdm


class Progress:
    """Counts the requests of this rank; silent unless asked to draw.

    Args:
        draw: whether there is somebody to look, who has a terminal.
    """

    def __init__(self, draw: bool) -> None:
        self._draw = draw and sys.stderr.isatty()
        self._bar: tqdm | None = None

    @contextlib.contextmanager
    def over(self, what: str, total: int, ranks: int) -> Iterator[None]:
        """While ``total`` requests are answered by ``ranks`` ranks together."""
        if not self._draw:
            yield
            return
        with tqdm(total=-(-total // ranks), desc=what, unit="request") as self._bar:
            yield
        self._bar = None

    def advance(self, count: int) -> None:
        """``count`` further ones are done."""
        if self._bar is not None:
            self._bar.update(count)
