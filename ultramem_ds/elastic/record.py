"""What a checkpoint says about its own files: which rank's file holds which piece of what.

Beside DeepSpeed's files lie ``layout_rank_XXXXX.json`` (one per rank, written in parallel: the
pieces of that rank's flat buffers) and ``layout.json`` (parameter shapes; size and digest of every
file). The digest is taken over the CRC-32 of each record of PyTorch's zip files, which stand in the
directory at their end: reading it costs a seek, not the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from ultramem_ds.sharding.blocks import Block, Piece, whole
from ultramem_ds.utils.files import write_json, write_text

LAYOUT = "layout.json"
FORMAT = 1


@dataclass(frozen=True)
class Store:
    """One rank's file of one kind of optimizer state.

    Attributes:
        file: name inside the checkpoint directory.
        optimizer: class of the optimizer that wrote it.
        pieces: what its flat buffers hold, ordered by (buffer, offset).
    """

    file: str
    optimizer: str
    pieces: list[Piece]


@dataclass(frozen=True)
class ParameterRecord:
    """A parameter's shape in the one-process model, and whether it is a value table."""

    shape: tuple[int, ...]
    is_table: bool

    @property
    def block(self) -> Block:
        """All of it."""
        return whole(self.shape, self.is_table)


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and digest of one file."""

    num_bytes: int
    digest: str


@dataclass(frozen=True)
class Layout:
    """``layout.json``: the parameters of the model and the files of the checkpoint."""

    world_size: int
    parameters: dict[str, ParameterRecord]
    files: dict[str, FileRecord]


def rank_file(rank: int) -> str:
    """Name of one rank's list of pieces."""
    return f"layout_rank_{rank:05d}.json"


def write_rank_layout(checkpoint: Path, rank: int, stores: Mapping[str, Store]) -> None:
    """Write one rank's list of pieces; every rank for itself."""
    lines = {
        name: {
            "file": store.file,
            "optimizer": store.optimizer,
            "pieces": [[p.name, p.buffer, p.offset, *astuple(p.block)] for p in store.pieces],
        }
        for name, store in stores.items()
    }
    text = json.dumps({"format": FORMAT, "stores": lines}, separators=(",", ":"))
    write_text(checkpoint / rank_file(rank), text + "\n")


def read_rank_layout(checkpoint: Path, rank: int) -> dict[str, Store]:
    """Read one rank's list of pieces.

    Raises:
        ValueError: it is missing or is no such list.
    """
    values = _read_json(checkpoint / rank_file(rank))
    return {
        name: Store(
            store["file"],
            store["optimizer"],
            [Piece(n, b, o, Block(*block)) for n, b, o, *block in store["pieces"]],
        )
        for name, store in values["stores"].items()
    }


def write_layout(
    checkpoint: Path, world_size: int, parameters: Mapping[str, ParameterRecord]
) -> None:
    """Write ``layout.json`` over every file present; one rank, after all others have written.

    The files are made durable on the way, so that a checkpoint is complete once it is renamed.
    """
    files = {
        str(path.relative_to(checkpoint)): _sync_and_describe(path)
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file()
    }
    values = {
        "format": FORMAT,
        "world_size": world_size,
        "parameters": {
            name: {"shape": list(record.shape), "is_table": record.is_table}
            for name, record in parameters.items()
        },
        "files": {name: asdict(record) for name, record in files.items()},
    }
    write_json(checkpoint / LAYOUT, values)


def read_layout(checkpoint: Path) -> Layout:
    """Read ``layout.json`` without looking at the files it names.

    Raises:
        ValueError: it is missing or is no layout.
    """
    values = _read_json(checkpoint / LAYOUT)
    return Layout(
        values["world_size"],
        {
            name: ParameterRecord(tuple(p["shape"]), p["is_table"])
            for name, p in values["parameters"].items()
        },
        {name: FileRecord(**record) for name, record in values["files"].items()},
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: the checkpoint is incomplete") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"{path} is not a layout of format {FORMAT}")
    return values


def check_files(checkpoint: Path, layout: Layout, names: Iterable[str]) -> None:
    """Compare files with what the layout recorded when they were written.

    Raises:
        ValueError: a file is missing, short or another checkpoint's; the message names it.
    """
    for name in names:
        path = checkpoint / name
        if name not in layout.files:
            raise ValueError(f"{path} is not among the files that {checkpoint / LAYOUT} records")
        expected = layout.files[name]
        if not path.exists():
            raise ValueError(f"{path} is missing: the checkpoint is incomplete")
        num_bytes = path.stat().st_size
        if num_bytes != expected.num_bytes:
            raise ValueError(
                f"{path} has {num_bytes} bytes, not the {expected.num_bytes} that were written: "
                "it is truncated or another checkpoint's"
            )
        if _digest(path) != expected.digest:
            raise ValueError(
                f"{path} is not the file that this checkpoint wrote (contents differ from "
                f"{checkpoint / LAYOUT}): it is damaged or another checkpoint's"
            )


def _sync_and_describe(path: Path) -> FileRecord:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        return FileRecord(os.fstat(descriptor).st_size, _digest(path))
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    """Of a zip file, over its directory (names, sizes, CRCs); of any other, over its contents."""
    digest = hashlib.sha256()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                digest.update(f"{record.filename}:{record.file_size}:{record.CRC}\n".encode())
    else:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
