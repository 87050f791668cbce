"""The weights of a checkpoint, of any layout, chunk by chunk; and all of them in one file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ultramem_ds.checkpoint.directory import find_checkpoint
from ultramem_ds.checkpoint.reader import CheckpointReader
from ultramem_ds.checkpoint.state import MASTER
from ultramem_ds.sharding.blocks import Block
from ultramem_ds.utils.safetensors_file import StreamedTensor, write_safetensors

CHUNK_ELEMENTS = 1 << 22  # held in memory at a time
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# R rows and C columns of a block.


def export_safetensors(path: Path, output: Path, dtype: str = "fp32") -> None:
    """Write all weights of a checkpoint, of any layout, into one safetensors file.

    Names and shapes are the one-process model's (``LanguageModel.load_state_dict`` takes them);
    buffers are included, those of integers as they are. At most ``CHUNK_ELEMENTS`` weights are in
    memory at a time.

    Args:
        path: a run directory or a checkpoint directory.
        output: the file; appears when it is complete.
        dtype: ``fp32`` (the masters) or ``bf16``.

    Raises:
        ValueError: an unknown dtype, or the checkpoint is damaged.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is none of {', '.join(DTYPES)}")
    checkpoint = find_checkpoint(path)
    reader = CheckpointReader(checkpoint)
    tensors = [
        streamed_parameter(reader, name, name, DTYPES[dtype], record.shape, record.block)
        for name, record in reader.parameters.items()
    ]
    for name, value in reader.buffers().items():
        floating = value.is_floating_point()
        tensors.append(StreamedTensor.of(name, value.to(DTYPES[dtype]) if floating else value))
    write_safetensors(output, tensors, {"checkpoint": checkpoint.name, "format": "pt"})


def streamed_parameter(
    reader: CheckpointReader,
    parameter: str,
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    block: Block,
) -> StreamedTensor:
    """Whole rows of a parameter's masters as a tensor of a file.

    Args:
        reader: of the checkpoint.
        parameter: its name there.
        name: its name in the file.
        dtype: what the masters are rounded to.
        shape: of ``block`` in the file.
        block: the rows.
    """

    def chunks() -> Iterator[Tensor]:
        step = max(1, CHUNK_ELEMENTS // block.num_columns)
        end = block.first_row + block.num_rows
        for first in range(block.first_row, end, step):
            part = Block(first, min(step, end - first), block.first_column, block.num_columns)
            chunk_RC = torch.empty(part.num_rows, part.num_columns)
            reader.read(parameter, MASTER, part, chunk_RC)
            yield chunk_RC.to(dtype)

    return StreamedTensor(name, dtype, shape, chunks)
