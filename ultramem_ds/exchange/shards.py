"""A directory of safetensors shards with an index: written in a stream, read row by row."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ultramem_ds.utils.files import read_json, write_json
from ultramem_ds.utils.safetensors_file import StreamedTensor, write_safetensors

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB|TB)", re.IGNORECASE)
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """Bytes in ``5GB``, ``500MB``, ``1.5TB``; decimal units.

    Raises:
        ValueError: it is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    num_bytes = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if num_bytes < 1:
        raise ValueError(f"--max-shard-size {text!r} is no size such as 5GB, 500MB, 100KB")
    return num_bytes


def write_shards(directory: Path, tensors: Sequence[StreamedTensor], max_bytes: int) -> list[str]:
    """Write tensors into files of at most ``max_bytes``; a larger tensor gets a file of its own.

    Returns:
        The files' names, the index's last where there is one.
    """
    shards: list[list[StreamedTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.num_bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.num_bytes
    if len(shards) == 1:
        write_safetensors(directory / WEIGHTS, tensors, {"format": "pt"})
        return [WEIGHTS]
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    weight_map: dict[str, str] = {}
    for name, shard in zip(names, shards):
        write_safetensors(directory / name, shard, {"format": "pt"})
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.num_bytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / INDEX, index)
    return [*names, INDEX]


class ShardReader:
    """The tensors of such a directory; every file is opened and measured at construction.

    Args:
        directory: holds ``model.safetensors``, or an index and what it names.

    Raises:
        ValueError: a file is missing, short or no safetensors file, or lacks what the index says.
    """

    def __init__(self, directory: Path) -> None:
        from safetensors import safe_open

        self.directory = directory
        self._slices: dict[str, Any] = {}
        self._files = []
        for name, expected in _contents(directory).items():
            path = directory / name
            if not path.is_file():
                raise ValueError(f"{path} is missing: the export is incomplete")
            try:
                file = safe_open(path, framework="pt")
            except Exception as error:  # safetensors' own type, or one of the file system
                raise ValueError(f"{path} is damaged or cut short: {error}") from None
            present = set(file.keys())
            if expected is not None and (missing := sorted(expected - present)):
                raise ValueError(f"{path} lacks {missing[0]}, which {INDEX} says it holds")
            self._files.append(file)
            self._slices |= {tensor: file.get_slice(tensor) for tensor in present}

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._slices)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._slices[name].get_shape())

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """Rows of a tensor, in the file's dtype; the file is mapped, not read."""
        rows: Tensor = self._slices[name][first : first + count]
        return rows

    def whole(self, name: str) -> Tensor:
        """A tensor."""
        value: Tensor = self._slices[name][...]
        return value


def _contents(directory: Path) -> dict[str, set[str] | None]:
    """Names of the files, and what the index says is in each; None without an index."""
    if (directory / WEIGHTS).is_file():
        return {WEIGHTS: None}
    index = directory / INDEX
    if not index.is_file():
        raise ValueError(f"{directory} holds neither {WEIGHTS} nor {INDEX}: it is no export")
    try:
        weight_map = read_json(index)["weight_map"]
        found: dict[str, set[str] | None] = {}
        for tensor, file in weight_map.items():
            if Path(file).name != file:
                raise ValueError(f"{index} names {file!r}, which is not beside it")
            known = found.setdefault(file, set())
            assert known is not None
            known.add(tensor)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{index} is no index of shards: {error!r}") from None
    return found
