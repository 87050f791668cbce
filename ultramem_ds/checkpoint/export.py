"""All weights of a checkpoint, of any layout, in one safetensors file."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ultramem_ds.checkpoint.directory import (
    find_checkpoint,
)
from ultramem_ds.checkpoint.reader import CheckpointReader
from ultramem_ds.checkpoint.state import MASTER

CHUNK_ELEMENTS = 1 << 22  # held in memory at a time by the safetensors export
DTYPES = {"fp32": (torch.float32, "F32"), "bf16": (torch.bfloat16, "BF16")}

# N rows of a table, V value width, R rows and C columns of a block, P ranks.


def export_safetensors(path: Path, output: Path, dtype: str = "fp32") -> None:
    """Write all weights of a checkpoint, of any layout, into one safetensors file.

    Names and shapes are the one-process model's (``LanguageModel.load_state_dict`` takes them);
    buffers are included. At most ``CHUNK_ELEMENTS`` weights are in memory at a time.

    Args:
        path: a run directory or a checkpoint directory.
        output: the file; appears when it is complete.
        dtype: ``fp32`` (the masters) or ``bf16``.

    Raises:
        ValueError: an unknown dtype, or the checkpoint is damaged.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is none of {', '.join(DTYPES)}")
    torch_dtype, format_name = DTYPES[dtype]
    checkpoint = find_checkpoint(path)
    reader = CheckpointReader(checkpoint)
    header: dict[str, Any] = {"__metadata__": {"checkpoint": checkpoint.name, "format": "pt"}}
    shapes = {name: record.shape for name, record in reader.parameters.items()}
    buffers = reader.buffers()
    shapes |= {name: tuple(value.shape) for name, value in buffers.items()}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + torch.Size(shape).numel() * torch_dtype.itemsize
        header[name] = {"dtype": format_name, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = output.with_name(f".{output.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in reader.parameters:
                for chunk in _chunks(reader, name):
                    file.write(_bytes(chunk.to(torch_dtype)))
            for value in buffers.values():
                file.write(_bytes(value.to(torch_dtype)))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(output)
    finally:
        temporary.unlink(missing_ok=True)


def _chunks(reader: CheckpointReader, name: str) -> Iterator[Tensor]:
    """The master weights of one parameter in row order, a bounded number at a time."""
    block = reader.parameters[name].block
    step = max(1, CHUNK_ELEMENTS // block.num_columns)
    for first in range(0, block.num_rows, step):
        part = replace(block, first_row=first, num_rows=min(step, block.num_rows - first))
        chunk_RC = torch.empty(part.num_rows, part.num_columns)
        reader.read(name, MASTER, part, chunk_RC)
        yield chunk_RC


def _bytes(values: Tensor) -> bytes:
    return values.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
