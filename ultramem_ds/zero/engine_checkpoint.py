"""Save and load an engine's checkpoint, at the same layout or at any other.

Phases of a load, each rank for itself but for the last: check the files against their record;
compare the recorded pieces with the engine's (the same on every rank: DeepSpeed's own load is exact
and is used); else fill every flat buffer piece by piece from the old ranks' files, set Adam's step
and the counters, restore the buffers, and let the parameters follow the masters (a collective).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ultramem_ds.checkpoint.fill import check_state, fill_state
from ultramem_ds.checkpoint.host_copies import HostCopies
from ultramem_ds.checkpoint.rank_files import RankFiles
from ultramem_ds.checkpoint.reader import CheckpointReader
from ultramem_ds.checkpoint.record import ParameterRecord, Store, write_layout
from ultramem_ds.checkpoint.safe import DamagedCheckpointError
from ultramem_ds.checkpoint.state import OptimizerState, OwnState
from ultramem_ds.checkpoint.weights import WeightSource, fill_masters
from ultramem_ds.sharding.comm import Comm
from ultramem_ds.zero.capture import CapturingEngine, copy_recovery_scripts
from ultramem_ds.zero.experts import padding_files

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
        self._files = CapturingEngine(padding_files(engine.module))
        engine.checkpoint_engine = self._files
        engine._copy_recovery_script = lambda save_path: None  # written with the other files

    def capture(
        self, directory: Path, tag: str, extra: Mapping[str, Any], copies: HostCopies | None = None
    ) -> RankFiles:
        """This rank's part of checkpoint ``directory/tag``; a collective that writes nothing.

        Args:
            directory: where checkpoints lie.
            tag: of the new one.
            extra: further objects to save, by file name.
            copies: copies the state to host memory; without, it must be written before training
                goes on.
        """
        with contextlib.redirect_stdout(sys.__stderr__):
            self.engine.save_checkpoint(
                str(directory), tag=tag, save_latest=False, exclude_frozen_parameters=True
            )
        sources: dict[str, Callable[[], Any]] = {
            Path(path).name: partial(_same, value) for path, value in self._files.take().items()
        }
        file = Path(self.engine._get_zero_ckpt_name(str(directory), tag)).name
        stores = {ZERO: Store(file, self._optimizer, self.zero.pieces())}
        for name, state in self.own.items():
            file = f"{name}_rank_{self.comm.rank:05d}.pt"
            sources[file] = state.saved  # asked when written: it may have to be read from NVMe
            stores[name] = Store(file, type(state).__name__, state.pieces())
        sources |= {name: partial(_same, value) for name, value in extra.items()}
        if copies is not None:
            copied = copies.copy({name: source() for name, source in sources.items()})
            sources = {name: partial(_same, value) for name, value in copied.items()}
        return RankFiles(self.comm.rank, sources, stores)

    def seal(self, checkpoint: Path) -> None:
        """Record all files; one rank, after all ranks have written theirs."""
        write_layout(checkpoint, self.comm.world_size, self.parameters)
        copy_recovery_scripts(checkpoint.parent)

    def load(self, checkpoint: Path) -> bool:
        """Restore parameters, optimizer state, counters and buffers.

        Returns:
            Whether the layout was the same, so that DeepSpeed's own load could be used.

        Raises:
            DamagedCheckpointError: on every rank, if any rank finds its part damaged or unsafe; the
                message says why.
            ValueError: on every rank, if it is another model's.
        """
        with self.comm.raising_together(DamagedCheckpointError):
            reader = CheckpointReader(checkpoint)
            reader.verify(self.comm.rank, self.comm.world_size)
        with self.comm.raising_together(ValueError):
            self._check_model(reader)
        same = self.comm.all_agree(self._same_pieces(reader))
        states: list[OptimizerState] = list(self.own.values())
        if same:
            self._load_exactly(reader)
        else:
            states.append(self.zero)
        with self.comm.raising_together(DamagedCheckpointError):
            for state in states:
                fill_state(reader, state, self.comm.rank)
            if not same:
                restore_counters(reader, self.engine)
        for state in states:
            state.publish()
        return same

    def start_from(self, weights: WeightSource) -> None:
        """Take weights and buffers from elsewhere; no moments, no steps taken.

        Raises:
            ValueError: on every rank, if any rank cannot read its part; the message says why.
        """
        states: list[OptimizerState] = [*self.own.values(), self.zero]
        with self.comm.raising_together(ValueError):
            for state in states:
                fill_masters(weights, state)
            copy_buffers(weights.buffers(), self.engine.module)
        for state in states:
            state.publish()

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
        own = [dict(group, params=None) for group in self.engine.optimizer.param_groups]
        with contextlib.redirect_stdout(sys.__stderr__):
            # Not strict: parameters that DeepSpeed does not train are not in its files.
            path, _ = self.engine.load_checkpoint(
                str(checkpoint.parent), tag=checkpoint.name, load_module_strict=False
            )
        if path is None:
            raise DamagedCheckpointError(f"{checkpoint} could not be loaded by DeepSpeed")
        # DeepSpeed's groups come with the settings they were saved with; this run's count.
        for group, settings in zip(self.engine.optimizer.param_groups, own, strict=True):
            group.update({key: value for key, value in settings.items() if key != "params"})
        with self.comm.raising_together(DamagedCheckpointError):
            check_state(checkpoint, self.zero)


def _same(value: Any) -> Any:
    return value


def restore_counters(reader: CheckpointReader, engine: Any) -> None:
    """Give the engine the step counts and the module's buffers of the checkpoint."""
    saved = reader.model_states()
    engine.global_steps = saved["global_steps"]
    engine.global_samples = saved["global_samples"]
    engine.skipped_steps = saved["skipped_steps"]
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    copy_buffers({name: saved["module"][name] for name in saved["buffer_names"]}, engine.module)


def copy_buffers(values: Mapping[str, Tensor], module: nn.Module) -> None:
    """Copy persistent buffers by name into a module that has them."""
    buffers = dict(module.named_buffers())
    with torch.no_grad():
        for name, value in values.items():
            buffers[name].copy_(value)
