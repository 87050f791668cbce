"""Global samples that a run jumps over, and the order that remains.

A run consumes positions 0, 1, 2, ... one after the other; position p is the p-th global sample
that lies in no skipped range. Optimizer step s takes positions [s*G, (s+1)*G), whatever the number
of ranks: with the ranges recorded in the checkpoint, a resumed run keeps the order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

Range = tuple[int, int]

_RANGE = re.compile(r"^(\d+):(\d+)$")


def parse_range(text: str) -> Range:
    """``A:B`` -> (A, B), samples A to B - 1.

    Raises:
        ValueError: if it is not of that form, or empty.
    """
    match = _RANGE.match(text.strip())
    if not match or int(match[1]) >= int(match[2]):
        raise ValueError(
            f"--skip-samples {text!r} is not A:B with 0 <= A < B (global samples A to B - 1)"
        )
    return int(match[1]), int(match[2])


def format_ranges(ranges: Iterable[Range]) -> str:
    """``((0, 4), (8, 9))`` -> ``0:4 8:9``."""
    return " ".join(f"{begin}:{end}" for begin, end in ranges)


@dataclass(frozen=True)
class SkipRanges:
    """Ascending ranges that neither touch nor overlap.

    Attributes:
        ranges: (begin, end) of each, end not included.
    """

    ranges: tuple[Range, ...] = ()

    @classmethod
    def of(cls, ranges: Iterable[Iterable[int]]) -> SkipRanges:
        """From any ranges, touching and overlapping ones joined."""
        joined: list[Range] = []
        for begin, end in sorted((int(a), int(b)) for a, b in ranges):
            if joined and begin <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(joined[-1][1], end))
            else:
                joined.append((begin, end))
        return cls(tuple(joined))

    def sample_at(self, position: int) -> int:
        """The global sample at ``position`` of the run."""
        sample = position
        for begin, end in self.ranges:
            if sample < begin:
                break
            sample += end - begin
        return sample

    def samples(self, first: int, last: int) -> tuple[Range, ...]:
        """Global samples at positions [first, last), as ranges."""
        if first >= last:
            return ()
        pieces = []
        begin, stop = self.sample_at(first), self.sample_at(last - 1) + 1
        for hole_begin, hole_end in self.ranges:
            if begin < hole_begin < stop:
                pieces.append((begin, hole_begin))
                begin = hole_end
        return (*pieces, (begin, stop))

    def extended(self, new: Iterable[Range], consumed: int) -> SkipRanges:
        """With ``new`` ranges, for a run that has consumed ``consumed`` positions.

        Raises:
            ValueError: if a new range holds samples that the run has already trained on.
        """
        used = self.samples(0, consumed)
        for begin, end in new:
            for a, b in used:
                if begin < b and a < end:
                    raise ValueError(
                        f"--skip-samples {begin}:{end}: the run has already trained on samples "
                        f"{format_ranges([(max(a, begin), min(b, end))])}; the next one is "
                        f"{self.sample_at(consumed)}. Skip from there, or go back: write the name "
                        "of an earlier checkpoint into the run's checkpoints/latest"
                    )
        return SkipRanges.of([*self.ranges, *new])


NO_SKIPS = SkipRanges()
