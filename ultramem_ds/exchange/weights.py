"""The weights of an exported directory, by our names, block by block: a ``WeightSource``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ultramem_ds.checkpoint.parameters import parameter_records
from ultramem_ds.config.schema import Config
from ultramem_ds.exchange.shards import ShardReader
from ultramem_ds.exchange.tensors import PREFIX, exported_name
from ultramem_ds.model.memory.expansion import round_tables, shuffle_seed
from ultramem_ds.sharding.blocks import Block

# R rows and C columns of a block.


class ExportedWeights:
    """Those of an exported directory, checked at construction against its configuration.

    Args:
        shards: its files.
        config: the model's.
        values: its ``config.json``.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape, or a permutation is none that
            this program makes.
    """

    def __init__(self, shards: ShardReader, config: Config, values: Mapping[str, Any]) -> None:
        self._shards = shards
        self._records = parameter_records(config)
        self._config = config
        parts = int(values.get("memory_table_parts") or 1)
        self._parts = {
            name: self._stored_names(name, parts if record.is_table else 1)
            for name, record in self._records.items()
        }
        self._check_parameters()
        self._rounds: set[str] = set()
        self._buffers = self._read_buffers()
        self._refuse_unknown()

    @staticmethod
    def _stored_names(name: str, parts: int) -> list[str]:
        exported = exported_name(name)
        if parts == 1:
            return [exported]
        stem = exported.removesuffix(".weight")
        return [f"{stem}.part_{part}.weight" for part in range(parts)]

    def _check_parameters(self) -> None:
        where = self._shards.directory
        present = self._shards.names()
        for name, stored in self._parts.items():
            missing = [each for each in stored if each not in present]
            if missing:
                raise ValueError(f"{where} holds no {missing[0]}")
            shape, expected = self._stored_shape(stored), self._records[name].shape
            if shape != expected:
                raise ValueError(
                    f"{where} holds {stored[0]} of shape {shape}, config.json says {expected}"
                )

    def _refuse_unknown(self) -> None:
        where, present = self._shards.directory, self._shards.names()
        known = {each for stored in self._parts.values() for each in stored}
        unknown = sorted(present - known - {PREFIX + name for name in self._buffers} - self._rounds)
        if unknown:
            raise ValueError(f"{where} holds {unknown[0]}, which this model has not")

    def _stored_shape(self, stored: list[str]) -> tuple[int, ...]:
        shapes = [self._shards.shape(name) for name in stored]
        if len(shapes) == 1:
            return shapes[0]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def _read_buffers(self) -> dict[str, Tensor]:
        """Directions and stored permutations; the bijection's rounds must be the ones we make."""
        buffers: dict[str, Tensor] = {}
        if not self._config.has_memory:
            return buffers
        memory = self._config.memory
        present = self._shards.names()
        for j in range(len(memory.spans)):
            form, shuffle = f"memories.{j}.retrieval.form.", f"memories.{j}.shuffle."
            if memory.retrieval == "product-key":
                buffers[f"{form}directions"] = torch.ones(2, memory.num_heads, 1)
            wanted = [f"{form}directions"] if memory.retrieval == "tdqkr" else []
            wanted += [f"{shuffle}index"] if memory.shuffle == "stored" else []
            for name in wanted:
                if PREFIX + name not in present:
                    raise ValueError(f"{self._shards.directory} holds no {PREFIX + name}")
                buffers[name] = self._shards.whole(PREFIX + name).clone()
            rounds = f"{PREFIX}{shuffle}rounds"
            if memory.shuffle == "bijection" and rounds in present:
                self._rounds.add(rounds)
                ours = round_tables(memory.num_keys, shuffle_seed(j))
                if not torch.equal(self._shards.whole(rounds), ours):
                    raise ValueError(
                        f"{self._shards.directory} holds {rounds} of another permutation than "
                        "this program makes"
                    )
        return buffers

    def buffers(self) -> dict[str, Tensor]:
        """See :class:`WeightSource`."""
        return self._buffers

    def read(self, name: str, block: Block, out_RC: Tensor) -> None:
        """See :class:`WeightSource`."""
        stored, record = self._parts[name], self._records[name]
        if not record.is_table:
            self._read_flat(stored[0], block, out_RC)
            return
        begin = 0
        for each in stored:
            rows = self._shards.shape(each)[0]
            held = Block(begin, rows, 0, record.block.num_columns)
            part = held.overlap(block)
            if part.numel:
                values_RC = self._shards.rows(each, part.first_row - begin, part.num_rows)
                columns = slice(part.first_column, part.first_column + part.num_columns)
                block.cut(out_RC, part).copy_(values_RC[:, columns])
            begin += rows

    def _read_flat(self, stored: str, block: Block, out_RC: Tensor) -> None:
        """A flat range of a tensor, through the whole rows that hold it."""
        shape = self._shards.shape(stored)
        width = math.prod(shape[1:])
        first = block.first_row // width
        last = -(-(block.first_row + block.num_rows) // width)
        values = self._shards.rows(stored, first, last - first).reshape(-1)
        begin = block.first_row - first * width
        out_RC.copy_(values[begin : begin + block.num_rows].view(-1, 1))
