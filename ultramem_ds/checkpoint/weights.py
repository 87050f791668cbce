"""Weights alone, wherever they are: what a new run starts from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from ultramem_ds.checkpoint.reader import CheckpointReader
from ultramem_ds.checkpoint.record import ParameterRecord
from ultramem_ds.checkpoint.state import MASTER, OptimizerState
from ultramem_ds.sharding.blocks import Block, Piece

# R rows and C columns of a block.


class WeightSource(Protocol):
    """A model's weights, read block by block under the one-process model's names."""

    def read(self, name: str, block: Block, out_RC: Tensor) -> None:
        """Copy a block of a parameter into ``out_RC`` (block.num_rows, block.num_columns).

        Any dtype and device. Raises ``ValueError`` if the source does not hold it, or not whole.
        """
        ...

    def buffers(self) -> dict[str, Tensor]:
        """The persistent buffers: directions of the Tucker cores, stored permutations."""
        ...


class RunWeights:
    """The fp32 masters of a checkpoint of any world size, scheme, ZeRO stage and offload.

    Args:
        checkpoint: its directory.
        rank: the reading rank; spreads readers over copies of a table.

    Raises:
        DamagedCheckpointError: the checkpoint's record is missing or damaged.
    """

    def __init__(self, checkpoint: Path, rank: int = 0) -> None:
        self._reader = CheckpointReader(checkpoint)
        self._rank = rank

    def check_shapes(self, parameters: Mapping[str, ParameterRecord]) -> None:
        """Compare with a model's parameters, by the one-process model's names.

        Raises:
            ValueError: naming the first that the checkpoint does not hold.
        """
        for name, record in parameters.items():
            if self._reader.parameters.get(name) != record:
                raise ValueError(
                    f"{self._reader.checkpoint} does not hold {name} of shape {record.shape}"
                )

    def read(self, name: str, block: Block, out_RC: Tensor) -> None:
        """See :class:`WeightSource`."""
        self._reader.read(name, MASTER, block, out_RC, self._rank)

    def buffers(self) -> dict[str, Tensor]:
        """See :class:`WeightSource`."""
        return self._reader.buffers()


def fill_masters(weights: WeightSource, state: OptimizerState) -> None:
    """Copy this rank's pieces of all masters; moments become zeros, no update has been taken.

    Raises:
        ValueError: see :meth:`WeightSource.read`.
    """
    by_buffer: list[list[Piece]] = [[] for _ in range(state.num_buffers)]
    for piece in state.pieces():
        by_buffer[piece.buffer].append(piece)
    for index, pieces in enumerate(by_buffer):
        with state.open_buffer(index) as flats:
            for piece in pieces:
                weights.read(piece.name, piece.block, piece.view(flats[MASTER]))
    state.set_step(0)
