"""Save and load an engine's checkpoint, at the same layout or at any other.

Phases of a load, each rank for itself but for the last: check the files against their record;
compare the recorded pieces with the engine's (the same on every rank: DeepSpeed's own load is exact
and is used); else fill every flat buffer piece by piece from the old ranks' files, set Adam's step
and the counters, restore the buffers, and let the parameters follow the masters (a collective).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ultramem_ds.config.schema import Config
from ultramem_ds.elastic.reader import CheckpointReader, check_finite
from ultramem_ds.elastic.record import (
    ParameterRecord,
    Store,
    check_files,
    write_layout,
    write_rank_layout,
)
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.sharding.blocks import Piece
from ultramem_ds.sharding.comm import Comm
from ultramem_ds.sharding.optimizer_state import OptimizerState, OwnState

ZERO = "zero"  # the store that DeepSpeed writes


class EngineCheckpoint:
    """The checkpoints of one engine.

    Args:
        engine: the DeepSpeed engine.
        zero: DeepSpeed's optimizer state.
        own: optimizer state that DeepSpeed knows nothing of, by the name of its files.
        parameters: the one-process model's, by name.
        comm: all ranks.
    """

    def __init__(
        self,
        engine: Any,
        zero: OptimizerState,
        own: Mapping[str, OwnState],
        parameters: Mapping[str, ParameterRecord],
        comm: Comm,
    ) -> None:
        self.engine = engine
        self.zero = zero
        self.own = dict(own)
        self.parameters = dict(parameters)
        self.comm = comm

    def save(self, directory: Path, tag: str) -> None:
        """Write ``directory/tag``, every rank its part; complete, but for ``layout.json``."""
        with contextlib.redirect_stdout(sys.stderr):
            self.engine.save_checkpoint(
                str(directory), tag=tag, save_latest=False, exclude_frozen_parameters=True
            )
        file = Path(self.engine._get_zero_ckpt_name(str(directory), tag)).name
        stores = {ZERO: Store(file, self._optimizer, self.zero.pieces())}
        for name, state in self.own.items():
            file = f"{name}_rank_{self.comm.rank:05d}.pt"
            state.write(directory / tag / file)
            stores[name] = Store(file, type(state).__name__, state.pieces())
        write_rank_layout(directory / tag, self.comm.rank, stores)

    def seal(self, directory: Path, tag: str) -> None:
        """Record all files; one rank, after all ranks' ``save``."""
        write_layout(directory / tag, self.comm.world_size, self.parameters)

    def load(self, checkpoint: Path) -> bool:
        """Restore parameters, optimizer state, counters and buffers.

        Returns:
            Whether the layout was the same, so that DeepSpeed's own load could be used.

        Raises:
            ValueError: on every rank, if any rank cannot load its part; the message says why.
        """
        with self.comm.raising_together(ValueError):
            reader = CheckpointReader(checkpoint)
            self._check_model(reader)
        same = self.comm.all_agree(self._same_pieces(reader))
        states: list[OptimizerState] = list(self.own.values())
        if same:
            self._load_exactly(reader)
        else:
            states.append(self.zero)
        with self.comm.raising_together(ValueError):
            for state in states:
                fill_state(reader, state, self.comm.rank)
            if not same:
                restore_counters(reader, self.engine)
        for state in states:
            state.publish()
        return same

    def _same_pieces(self, reader: CheckpointReader) -> bool:
        """Whether DeepSpeed's part is laid out as it was on the same rank when saved.

        The optimizer's class counts: loading replaces hyper-parameters that another lacks.
        """
        if reader.layout.world_size != self.comm.world_size:
            return False
        saved = reader.stores[self.comm.rank][ZERO]
        pieces = self.zero.pieces()  # none if its state is in files of our own
        return bool(pieces) and saved.optimizer == self._optimizer and saved.pieces == pieces

    @property
    def _optimizer(self) -> str:
        return type(self.engine.optimizer.optimizer).__name__

    def _check_model(self, reader: CheckpointReader) -> None:
        for name, record in self.parameters.items():
            stored = reader.parameters.get(name)
            if stored != record:
                shape = None if stored is None else stored.shape
                raise ValueError(
                    f"{reader.checkpoint} holds {name} as {shape}, this model has {record.shape}"
                )

    def _load_exactly(self, reader: CheckpointReader) -> None:
        checkpoint = reader.checkpoint
        with self.comm.raising_together(ValueError):
            file = reader.stores[self.comm.rank][ZERO].file
            check_files(checkpoint, reader.layout, [file, reader.model_file])
        with contextlib.redirect_stdout(sys.stderr):
            # Not strict: parameters that DeepSpeed does not train are not in its files.
            path, _ = self.engine.load_checkpoint(
                str(checkpoint.parent), tag=checkpoint.name, load_module_strict=False
            )
        if path is None:
            raise ValueError(f"{checkpoint} could not be loaded by DeepSpeed")
        with self.comm.raising_together(ValueError):
            check_state(checkpoint, self.zero)


def parameter_records(config: Config) -> dict[str, ParameterRecord]:
    """Name and shape of every parameter of the one-process model, from the configuration."""
    with torch.device("meta"):
        model = LanguageModel(config)
    return {
        name: ParameterRecord(tuple(param.shape), getattr(param, "role", None) == "table")
        for name, param in model.named_parameters()
    }


def fill_state(reader: CheckpointReader, state: OptimizerState, rank: int) -> None:
    """Copy masters, moments and Adam's step from the checkpoint into ``state``.

    Raises:
        ValueError: see :meth:`CheckpointReader.read`.
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


def restore_counters(reader: CheckpointReader, engine: Any) -> None:
    """Give the engine the step counts and the module's buffers of the checkpoint."""
    saved = reader.model_states()
    engine.global_steps = saved["global_steps"]
    engine.global_samples = saved["global_samples"]
    engine.skipped_steps = saved["skipped_steps"]
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    buffers = dict(engine.module.named_buffers())
    with torch.no_grad():
        for name in saved["buffer_names"]:
            buffers[name].copy_(saved["module"][name])


def check_state(checkpoint: Path, state: OptimizerState) -> None:
    """Look once at every piece that has been loaded.

    Raises:
        ValueError: there is NaN or infinity; the message names parameter and row.
    """
    pieces = state.pieces()
    for index in range(state.num_buffers):
        with state.open_buffer(index) as flats:
            for piece in pieces:
                for kind, flat in flats.items():
                    if piece.buffer == index:
                        what = f"{kind} of {piece.name}"
                        check_finite(piece.view(flat), piece.block, what, checkpoint)
