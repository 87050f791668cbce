"""Implicit value expansion: virtual slot -> physical row and projector (paper eq. 13-15).

A virtual slot id ``row * n + col`` in [0, E*N) goes through a fixed permutation; the physical row
is the permuted id modulo N, the projector its quotient. The permutation is a seeded bijection
computed on the fly (nothing per slot is stored), a stored table (released checkpoints), or none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ultramem_ds.config.schema import MemoryConfig
from ultramem_ds.kernels import resolve

# T tokens, K rows per token, n keys per side, E expansion, N physical rows.

_NUM_ROUNDS = 4  # a Feistel network with random round functions is pseudo-random from 4 rounds on


def shuffle_seed(table_index: int) -> int:
    """Seed of memory layer ``table_index``'s permutation, whatever the training seed is."""
    return 0x5EED + table_index


def round_tables(num_keys: int, seed: int) -> Tensor:
    """Round functions of a Feistel network over [0, n)^2: int64 (rounds, n), on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    shape = (_NUM_ROUNDS, num_keys)
    return torch.randint(num_keys, shape, generator=generator, device="cpu")


class IdentityShuffle(nn.Module):
    """No permutation: neighbouring virtual slots stay neighbours."""

    def forward(self, slots: Tensor) -> Tensor:
        """Return ``slots`` unchanged."""
        return slots


class StoredShuffle(nn.Module):
    """A permutation held as a table of E*N int64 (8 bytes per slot), saved with the model."""

    index: Tensor

    def __init__(self, num_slots: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("index", torch.randperm(num_slots, generator=generator))

    def forward(self, slots: Tensor) -> Tensor:
        """Map virtual slot ids (any shape, int64) to permuted ids."""
        return self.index[slots]


class BijectionShuffle(nn.Module):
    """A seeded permutation of [0, n*n) computed on the fly from 4 n numbers.

    A Feistel network over pairs (left, right) in [0, n)^2: each round maps (left, right) to
    (right, (left + f(right)) mod n), which is invertible for any f; f is a table of n random
    numbers per round. The domain is exactly n*n, so no cycle walking and no host sync is needed,
    and every intermediate fits int64 for any n below 2^31.
    """

    def __init__(self, num_keys: int, seed: int, kernel: str = "auto") -> None:
        super().__init__()
        self.num_keys = num_keys
        self.seed = seed
        self.kernel = kernel
        # Not a buffer: it follows from (n, seed), is never saved and survives meta construction.
        self._rounds: dict[torch.device, Tensor] = {}

    def take(self, rounds: Tensor) -> None:
        """Use these round functions, ``(rounds, n)`` int64, not those that the seed gives."""
        self._rounds = {rounds.device: rounds}

    def tables(self, device: torch.device) -> Tensor:
        """Round functions (rounds, n), made once by the CPU generator, copied once per device."""
        if device not in self._rounds:
            known = next(iter(self._rounds.values()), None)
            tables = round_tables(self.num_keys, self.seed) if known is None else known
            self._rounds[device] = tables.to(device)
        return self._rounds[device]

    def forward(self, slots: Tensor) -> Tensor:
        """Map virtual slot ids (any shape, int64) to permuted ids."""
        return resolve(self.kernel, slots.device).shuffle(slots, self.tables(slots.device))


def build_shuffle(memory: MemoryConfig, table_index: int) -> nn.Module:
    """The permutation of memory layer ``table_index``."""
    seed = shuffle_seed(table_index)
    if memory.shuffle == "bijection":
        return BijectionShuffle(memory.num_keys, seed, memory.kernel)
    if memory.shuffle == "stored":
        return StoredShuffle(memory.num_slots, seed)
    return IdentityShuffle()
