"""Which memory layers start at and finish after which block (paper section 3.2, "skip-layer")."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """Spans ``a:b`` turned into per-block lists of memory-layer indices; blocks count from 0.

    Attributes:
        starts: ``starts[i]``: memory layers that read the input of block i's MLP.
        finishes: ``finishes[i]``: memory layers whose output is added after block i.
    """

    starts: tuple[tuple[int, ...], ...]
    finishes: tuple[tuple[int, ...], ...]

    @classmethod
    def from_spans(cls, spans: tuple[tuple[int, int], ...], num_blocks: int) -> Placement:
        """Invert 1-based ``(a, b)`` spans; spans may touch, overlap or coincide."""
        blocks = range(1, num_blocks + 1)
        return cls(
            starts=tuple(tuple(i for i, (a, _) in enumerate(spans) if a == n) for n in blocks),
            finishes=tuple(tuple(i for i, (_, b) in enumerate(spans) if b == n) for n in blocks),
        )
