"""Read any block of any parameter or moment out of a checkpoint, whatever layout it was written in.

A reader maps the old ranks' files into memory and copies the overlaps with what is asked for: a
rank that loads its shard of a table touches those bytes and no others, and keeps none of them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ultramem_ds.checkpoint.record import (
    LAYOUT,
    ParameterRecord,
    check_files,
    rank_file,
    read_layout,
    read_rank_layout,
    verify,
)
from ultramem_ds.checkpoint.safe import DamagedCheckpointError, member, safe_load
from ultramem_ds.checkpoint.state import KINDS, MASTER, MOMENTS
from ultramem_ds.sharding.blocks import Block, Piece
from ultramem_ds.utils.mapped import copy_from_mapped

OPEN_FILES = 16  # mapped at a time
CHECKED_ELEMENTS = 1 << 17  # looked at together for NaN

# R rows and C columns of a block.


@dataclass(frozen=True)
class StoredBuffers:
    """The flat buffers of one file: by kind, then by number; and the updates taken."""

    flats: dict[str, list[Tensor]]
    step: int


class CheckpointReader:
    """One checkpoint directory, its record checked against the files as they are opened.

    Args:
        checkpoint: the directory.

    Raises:
        DamagedCheckpointError: the record is missing or damaged.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.layout = read_layout(checkpoint)
        self._verified: set[str] = set()
        self._sources: dict[str, dict[Block, list[tuple[str, Piece]]]] = defaultdict(dict)
        self.stores = []
        for rank in range(self.layout.world_size):
            check_files(checkpoint, self.layout, [rank_file(rank)])
            stores = read_rank_layout(checkpoint, rank)
            self.stores.append(stores)
            for store in stores.values():
                for piece in store.pieces:
                    # Copies of a block on other ranks are alternatives: which one is read is free.
                    copies = self._sources[piece.name].setdefault(piece.block, [])
                    copies.append((store.file, piece))
        self._open = lru_cache(maxsize=OPEN_FILES)(self._open_buffers)

    @property
    def parameters(self) -> dict[str, ParameterRecord]:
        """All parameters by the one-process model's names."""
        return self.layout.parameters

    def verify(self, rank: int, world_size: int) -> None:
        """Read this rank's share of all files; once every rank has, none is read again to check.

        Raises:
            DamagedCheckpointError: naming the first that is missing, altered or unsafe.
        """
        verify(self.checkpoint, self.layout, rank, world_size)
        self._verified.update(self.layout.files)

    def read(
        self, name: str, kind: str, block: Block, out_RC: Tensor, reader_rank: int = 0
    ) -> None:
        """Copy one block of one parameter.

        Args:
            name: parameter of the one-process model.
            kind: one of ``KINDS``.
            block: rows and columns of the parameter seen as a matrix.
            out_RC: (block.num_rows, block.num_columns), any dtype and device.
            reader_rank: spreads ranks over the copies where the checkpoint has several.

        Raises:
            DamagedCheckpointError: the checkpoint does not hold all of it, a file is not what was
                written, or there is NaN or infinity in it.
        """
        num_copied = 0
        for held, copies in self._sources.get(name, {}).items():
            part = held.overlap(block)
            if part.numel == 0:
                continue
            file, piece = copies[reader_rank % len(copies)]
            values_RC = self._stored(file, kind, piece)
            target_RC = block.cut(out_RC, part)
            copy_from_mapped(target_RC, held.cut(values_RC, part))
            check_finite(target_RC, part, f"{kind} of {name}", self.checkpoint / file)
            num_copied += part.numel
        if num_copied != block.numel:
            raise DamagedCheckpointError(
                f"{self.checkpoint / LAYOUT} covers {num_copied} of the {block.numel} elements of "
                f"{name} that are needed here: it does not belong to this model"
            )

    def step(self) -> int:
        """Optimizer updates taken."""
        first = next(store for store in self.stores[0].values() if store.pieces)
        return self._open(first.file).step

    @property
    def model_file(self) -> str:
        """Name of DeepSpeed's model file of rank 0."""
        names = [f for f in sorted(self.layout.files) if f.endswith("_model_states.pt")]
        return next(f for f in names if f.startswith(("mp_rank_00", "zero_pp_rank_0_")))

    def model_states(self) -> dict[str, Any]:
        """What DeepSpeed's model file of rank 0 holds: counters, and buffers under ``module``."""
        states: dict[str, Any] = self._load(self.model_file)
        return states

    def buffers(self) -> dict[str, Tensor]:
        """The module's persistent buffers (the memory layers' singular vectors)."""
        states = self.model_states()
        return {name: states["module"][name] for name in states["buffer_names"]}

    def _load(self, file: str) -> Any:
        check_files(self.checkpoint, self.layout, [file], self._verified)
        self._verified.add(file)
        return safe_load(member(self.checkpoint, file))

    def _stored(self, file: str, kind: str, piece: Piece) -> Tensor:
        flats = self._open(file).flats[kind]
        try:
            return piece.view(flats[piece.buffer])
        except (IndexError, RuntimeError, TypeError) as error:
            raise DamagedCheckpointError(
                f"{self.checkpoint / file} does not hold {kind} of {piece.name} where its record "
                f"says: {error}"
            ) from None

    def _open_buffers(self, file: str) -> StoredBuffers:
        stored = self._load(file)
        try:
            if "flats" in stored:  # a store of our own
                return StoredBuffers(**stored)
            return deepspeed_buffers(stored["optimizer_state_dict"])
        except (KeyError, TypeError, AttributeError, AssertionError, IndexError) as error:
            raise DamagedCheckpointError(
                f"{self.checkpoint / file} holds no optimizer state: {error!r}"
            ) from None


def deepspeed_buffers(zero: dict[str, Any]) -> StoredBuffers:
    """The flat buffers in DeepSpeed's ``optimizer_state_dict``, of any ZeRO stage."""
    masters = zero.get("fp32_flat_groups", zero.get("single_partition_of_fp32_groups"))
    adam = zero.get("optimizer_state_dict", zero.get("base_optimizer_state"))
    assert masters is not None and adam is not None, list(zero)
    states = [adam["state"][i] for group in adam["param_groups"] for i in group["params"]]
    flats = {MASTER: [m.detach() for m in masters], **{k: [s[k] for s in states] for k in MOMENTS}}
    assert set(flats) == set(KINDS)
    return StoredBuffers(flats, int(states[0]["step"]))


def check_finite(values_RC: Tensor, block: Block, what: str, source: Path) -> None:
    """Refuse NaN and infinity.

    Args:
        values_RC: the values of ``block``.
        block: where they stand in their parameter.
        what: kind and parameter, for the message.
        source: file or directory that they came from.

    Raises:
        DamagedCheckpointError: naming source, parameter and the first bad row.
    """
    # A sum is not finite where a summand is not. By parts: torch converts all of what it sums in
    # another type, which would be twice the table.
    step = max(1, CHECKED_ELEMENTS // max(1, values_RC.shape[1]))
    if all(torch.isfinite(part.sum(dtype=torch.float64)) for part in values_RC.split(step)):
        return
    bad_R = (~torch.isfinite(values_RC).all(1)).nonzero().flatten()
    if bad_R.numel():
        raise DamagedCheckpointError(
            f"{source} holds NaN or infinity in {what}: {bad_R.numel()} rows, the first is row "
            f"{block.first_row + int(bad_R[0])}"
        )
