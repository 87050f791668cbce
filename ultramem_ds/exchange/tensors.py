"""The tensors of an exported model, streamed out of a checkpoint (docs/export.md)."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ultramem_ds.checkpoint.export import streamed_parameter
from ultramem_ds.checkpoint.reader import CheckpointReader
from ultramem_ds.checkpoint.state import MASTER
from ultramem_ds.config.schema import Config
from ultramem_ds.model.memory.expansion import round_tables, shuffle_seed
from ultramem_ds.model.memory.scores import leading_singular_vectors
from ultramem_ds.sharding.blocks import Block
from ultramem_ds.utils.safetensors_file import StreamedTensor

# H heads, r Tucker rank, h cores, N rows, V value width.

HEAD = ("head.weight", "lm_head.weight")  # ours, theirs
PREFIX = "model."
_TABLE = re.compile(r"(memories\.\d+\.values)\.weight")


def exported_name(parameter: str) -> str:
    """A parameter's name in an exported directory."""
    return HEAD[1] if parameter == HEAD[0] else PREFIX + parameter


def num_table_parts(config: Config, dtype: torch.dtype, max_shard_bytes: int) -> int:
    """Tensors that each table is cut into, so that none is larger than a shard; 1 = not cut."""
    if not config.has_memory:
        return 1
    memory = config.memory
    row_bytes = memory.value_dim * dtype.itemsize
    rows_per_part = max(1, max_shard_bytes // row_bytes)
    wanted = -(-memory.num_rows // rows_per_part)
    rows_per_part = -(-memory.num_rows // wanted)  # equal parts but for the last
    return -(-memory.num_rows // rows_per_part)


def exported_tensors(
    reader: CheckpointReader, config: Config, dtype: torch.dtype, table_parts: int
) -> list[StreamedTensor]:
    """Every tensor of the exported model, tables in parts."""
    tensors: list[StreamedTensor] = []
    for name, record in reader.parameters.items():
        table = _TABLE.fullmatch(name)
        if table is None or table_parts == 1:
            exported = exported_name(name)
            tensors.append(
                streamed_parameter(reader, name, exported, dtype, record.shape, record.block)
            )
            continue
        num_rows, width = record.shape
        rows = -(-num_rows // table_parts)
        for part in range(table_parts):
            block = Block(part * rows, min(rows, num_rows - part * rows), 0, width)
            exported = f"{PREFIX}{table[1]}.part_{part}.weight"
            shape = (block.num_rows, width)
            tensors.append(streamed_parameter(reader, name, exported, dtype, shape, block))
    if config.has_memory:
        tensors += _derived(reader, config, dtype)
    return tensors


def _derived(reader: CheckpointReader, config: Config, dtype: torch.dtype) -> list[StreamedTensor]:
    """What a reader would otherwise compute: singular vectors and permutations."""
    memory = config.memory
    buffers = reader.buffers()
    tensors = []
    for j in range(len(memory.spans)):
        layer = f"memories.{j}."
        if memory.retrieval == "tdqkr":
            name = f"{layer}retrieval.form."
            core_hHrr = _whole(reader, name + "core").to(dtype).float()
            directions_2Hr = directions_of(core_hHrr, buffers[name + "directions"])
            tensors.append(StreamedTensor.of(f"{PREFIX}{name}directions", directions_2Hr))
        if memory.shuffle == "bijection":
            rounds = round_tables(memory.num_keys, shuffle_seed(j))
            tensors.append(StreamedTensor.of(f"{PREFIX}{layer}shuffle.rounds", rounds))
        elif memory.shuffle == "stored":
            index = buffers[f"{layer}shuffle.index"]
            tensors.append(StreamedTensor.of(f"{PREFIX}{layer}shuffle.index", index))
    return tensors


def directions_of(core_hHrr: Tensor, previous_2Hr: Tensor) -> Tensor:
    """Singular vectors (2, H, r) fp32 of the summed cores, their sign as ``previous`` has it."""
    total_Hrr = core_hHrr.sum(0).double()
    return leading_singular_vectors(total_Hrr, previous_2Hr.double()).float()


def _whole(reader: CheckpointReader, name: str) -> Tensor:
    """A small parameter's masters."""
    record = reader.parameters[name]
    block = record.block
    value = torch.empty(block.num_rows, block.num_columns)
    reader.read(name, MASTER, block, value)
    return value.view(record.shape)
