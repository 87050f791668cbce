"""Parquet files and Hugging Face hub ids, both streamed by the ``datasets`` library.

A shard is what ``datasets`` can read on its own without touching the rest: row groups of a Parquet
file, files of a hub dataset.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultramem_ds.data.sources import Unit

if TYPE_CHECKING:
    from datasets import IterableDataset

# Columns besides the text that name a record's subset.
_SUBSET_COLUMNS = ("meta", "red_pajama_subset")


def _stream(unit_path: str, *, hub: bool) -> IterableDataset:
    import datasets

    try:
        if not hub:
            stream = datasets.load_dataset(
                "parquet", data_files=unit_path, split="train", streaming=True
            )
            return stream.reshard()
        name, _, rest = unit_path.partition(":")
        config, _, split = rest.partition(":")
        return datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except Exception as error:  # datasets raises many types: offline, unknown id, script, corrupt
        raise ValueError(f"datasets cannot read {unit_path}: {error}") from error


def num_parquet_shards(path: Path) -> int:
    """Shards of one Parquet file.

    Raises:
        ValueError: if the file is not Parquet.
    """
    return max(1, _stream(str(path), hub=False).num_shards)


def num_hub_shards(name: str) -> int:
    """Shards of the dataset ``OWNER/NAME[:CONFIG[:SPLIT]]`` (split ``train`` by default).

    Raises:
        ValueError: if it cannot be opened, for example without a network.
    """
    return max(1, _stream(name, hub=True).num_shards)


def table_rows(unit: Unit, keys: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number within the shard, row) for each row of a ``parquet`` or ``hub`` unit.

    Only the columns that hold text (``keys``) or name a subset are read.

    Raises:
        ValueError: if the data is corrupt or cannot be reached.
    """
    stream = _stream(unit.path, hub=unit.kind == "hub")
    if stream.column_names is not None:
        wanted = [name for name in stream.column_names if name in (*keys, *_SUBSET_COLUMNS)]
        stream = stream.select_columns(wanted)
    try:
        yield from enumerate(stream.shard(num_shards=unit.end, index=unit.begin))
    except Exception as error:  # datasets and its readers raise many types
        raise ValueError(f"datasets cannot read {unit.path}: {error}") from error
