"""Who else works on the same prompts: nobody, or the ranks that share tables and experts.

Lookups of a sharded model are collectives, so that ranks with different prompts still have to make
the same number of forwards. ``sharding.comm.Comm`` is the many-rank implementation.
"""

from __future__ import annotations

import contextlib
from typing import Any, Protocol


class Peers(Protocol):
    """The processes of one model; all call the same methods in the same order."""

    @property
    def rank(self) -> int:
        """This process's place."""
        ...

    @property
    def world_size(self) -> int:
        """Number of processes."""
        ...

    def all_agree(self, mine: bool) -> bool:
        """Whether ``mine`` is true on every process."""
        ...

    def gather_objects(self, mine: Any) -> list[Any]:
        """What every process hands in, by rank."""
        ...

    def from_first(self, mine: Any) -> Any:
        """What the first process hands in."""
        ...

    def raising_together(self, kind: type[Exception]) -> contextlib.AbstractContextManager[None]:
        """If some process raises ``kind`` inside, every process does; no collective inside."""
        ...


class Alone:
    """One process."""

    rank = 0
    world_size = 1

    def all_agree(self, mine: bool) -> bool:
        """See :class:`Peers`."""
        return mine

    def gather_objects(self, mine: Any) -> list[Any]:
        """See :class:`Peers`."""
        return [mine]

    def from_first(self, mine: Any) -> Any:
        """See :class:`Peers`."""
        return mine

    def raising_together(self, kind: type[Exception]) -> contextlib.AbstractContextManager[None]:
        """See :class:`Peers`."""
        return contextlib.nullcontext()


ALONE = Alone()
