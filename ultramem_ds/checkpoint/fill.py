"""From a checkpoint into the flat buffers of a running optimizer, whatever their layout."""

from __future__ import annotations

from pathlib import Path

from ultramem_ds.checkpoint.reader import CheckpointReader, check_finite
from ultramem_ds.checkpoint.state import OptimizerState
from ultramem_ds.sharding.blocks import Piece


def fill_state(reader: CheckpointReader, state: OptimizerState, rank: int) -> None:
    """Copy masters, moments and Adam's step from the checkpoint into ``state``.

    Raises:
        DamagedCheckpointError: see :meth:`CheckpointReader.read`.
    """
    by_buffer: list[list[Piece]] = [[] for _ in range(state.num_buffers)]
    for piece in state.pieces():
        by_buffer[piece.buffer].append(piece)
    for index, pieces in enumerate(by_buffer):
        with state.open_buffer(index) as flats:
            for kind, flat in flats.items():
                for piece in pieces:
                    reader.read(piece.name, kind, piece.block, piece.view(flat), rank)
    state.set_step(reader.step())


def check_state(checkpoint: Path, state: OptimizerState) -> None:
    """Look once at every piece that has been loaded.

    Raises:
        DamagedCheckpointError: there is NaN or infinity; the message names parameter and row.
    """
    pieces = state.pieces()
    for index in range(state.num_buffers):
        with state.open_buffer(index) as flats:
            for piece in pieces:
                for kind, flat in flats.items():
                    if piece.buffer == index:
                        what = f"{kind} of {piece.name}"
                        check_finite(piece.view(flat), piece.block, what, checkpoint)
