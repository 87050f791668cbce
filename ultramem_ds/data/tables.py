"""Parquet files by row groups, and Hugging Face hub ids streamed by the ``datasets`` library.

A shard is what can be read on its own without touching the rest: a row group of a Parquet file,
files of a hub dataset.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultramem_ds.data.unit import Unit

if TYPE_CHECKING:
    from datasets import IterableDataset

# Columns besides the text that name a record's subset.
_SUBSET_COLUMNS = ("meta", "red_pajama_subset")
_BATCH_ROWS = 256


def num_parquet_shards(path: Path) -> int:
    """Row groups of one Parquet file, at least one even if it has none.

    Raises:
        ValueError: if the file is not Parquet, or damaged.
    """
    import pyarrow.parquet

    try:
        return max(1, pyarrow.parquet.read_metadata(path).num_row_groups)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error


def num_hub_shards(name: str) -> int:
    """Shards of the dataset ``OWNER/NAME[:CONFIG[:SPLIT]]`` (split ``train`` by default).

    Raises:
        ValueError: if it cannot be opened, for example without a network.
    """
    return max(1, _hub_stream(name).num_shards)


def table_rows(unit: Unit, columns: Sequence[str] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number within the shard, row) for each row of a ``parquet`` or ``hub`` unit.

    Args:
        unit: what to read.
        columns: those that may hold text, A.B for nested ones; only these and what names a subset
            are read. None reads all.

    Raises:
        ValueError: if the data is corrupt or cannot be reached.
    """
    rows = _hub_rows(unit, columns) if unit.kind == "hub" else _parquet_rows(unit, columns)
    yield from enumerate(rows)


def _parquet_rows(unit: Unit, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(unit.path) as file:
            if unit.begin >= file.num_row_groups:
                return  # a file without any
            chosen = None
            if columns is not None:
                paths = {p: p for p in (c.path for c in file.schema)}
                names = set(file.schema_arrow.names)
                wanted = (*columns, *_SUBSET_COLUMNS)
                chosen = [name for name in wanted if name in names or name in paths]
            batches = file.iter_batches(_BATCH_ROWS, row_groups=[unit.begin], columns=chosen)
            for batch in batches:
                yield from batch.to_pylist() or ({} for _ in range(batch.num_rows))
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{unit.path} cannot be read as Parquet: {error}") from error


def _hub_rows(unit: Unit, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    stream = _hub_stream(unit.path)
    if stream.column_names is not None and columns is not None:
        wanted = {*(name.split(".")[0] for name in columns), *columns, *_SUBSET_COLUMNS}
        stream = stream.select_columns([name for name in stream.column_names if name in wanted])
    try:
        yield from stream.shard(num_shards=unit.end, index=unit.begin)
    except Exception as error:  # datasets and its readers raise many types
        raise ValueError(f"datasets cannot read {unit.path}: {error}") from error


def _hub_stream(name: str) -> IterableDataset:
    import datasets

    try:
        path, _, rest = name.partition(":")
        config, _, split = rest.partition(":")
        return datasets.load_dataset(path, config or None, split=split or "train", streaming=True)
    except Exception as error:  # datasets raises many types: offline, unknown id, script
        raise ValueError(f"datasets cannot read {name}: {error}") from error
