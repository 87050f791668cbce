"""Seeded permutations of 0..n-1, computed entry by entry: no table, any n, random access."""

from __future__ import annotations

import hashlib

_ROUNDS = 6
_MASK64 = (1 << 64) - 1


def stable_hash(*parts: object) -> int:
    """64-bit hash of ``parts``, the same on every machine and version."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Permutation:
    """A bijection of 0..size-1: a balanced Feistel network with cycle walking.

    The network permutes [0, 4^k) with 4^k >= size; a result outside 0..size-1 is fed in again, less
    than three times more on average. Six rounds of a 64-bit mixing function (the finaliser of
    SplitMix64, Steele et al. 2014).
    """

    def __init__(self, size: int, *key: object) -> None:
        assert size >= 1, size
        self.size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._half_mask = (1 << self._half_bits) - 1
        self._round_keys = [stable_hash("feistel", number, *key) for number in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        """Image of ``index``."""
        assert 0 <= index < self.size, (index, self.size)
        value = index
        while True:
            left, right = value >> self._half_bits, value & self._half_mask
            for round_key in self._round_keys:
                left, right = right, left ^ (_mix(right ^ round_key) & self._half_mask)
            value = (left << self._half_bits) | right
            if value < self.size:
                return value


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)
