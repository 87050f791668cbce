"""Safetensors files written tensor by tensor, chunk by chunk; whole or absent."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ultramem_ds.utils.files import atomic_file

_FORMAT_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor that need not be in memory as a whole.

    Attributes:
        name: in the file.
        dtype: of the file; chunks have it already.
        shape: of all chunks together.
        chunks: gives its elements in row-major order, some at a time.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Tensor]]

    @classmethod
    def of(cls, name: str, value: Tensor) -> StreamedTensor:
        """A tensor that is in memory."""
        return cls(name, value.dtype, tuple(value.shape), lambda: (value,))

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: Path, tensors: Sequence[StreamedTensor], metadata: Mapping[str, str]
) -> None:
    """Write one file, durably, holding one chunk at a time.

    Args:
        path: the file; appears when it is complete.
        tensors: its contents in order.
        metadata: strings for its header.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.num_bytes
        header[tensor.name] = {
            "dtype": _FORMAT_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            for chunk in tensor.chunks():
                file.write(chunk.contiguous().view(-1).view(torch.uint8).numpy().data)
