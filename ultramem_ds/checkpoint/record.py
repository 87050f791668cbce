"""What a checkpoint says about its own files: which rank's file holds which piece of what.

Beside DeepSpeed's files lie ``layout_rank_XXXXX.json`` (one per rank, written in parallel: the
pieces of that rank's flat buffers; size and digest of its files) and ``layout.json`` (parameter
shapes; size, digest and writer of every file; its own digest).

The digest of a PyTorch file is taken over the CRC-32 of each record, which PyTorch computes as it
writes and keeps in the directory at the file's end: taking it costs a seek, not the file. PyTorch
does not look at them when it reads, so :func:`verify` does: it reads every byte once, each rank
those of the files that it wrote itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from ultramem_ds.checkpoint.safe import DamagedCheckpointError, member, safe_load
from ultramem_ds.sharding.blocks import Block, Piece, whole
from ultramem_ds.utils.files import write_json, write_text

LAYOUT = "layout.json"
FORMAT = 2


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
    """Size in bytes and digest of one file, and the rank that wrote it."""

    num_bytes: int
    digest: str
    rank: int


@dataclass(frozen=True)
class Layout:
    """``layout.json``: the parameters of the model and the files of the checkpoint."""

    world_size: int
    parameters: dict[str, ParameterRecord]
    files: dict[str, FileRecord]


def rank_file(rank: int) -> str:
    """Name of one rank's list of pieces."""
    return f"layout_rank_{rank:05d}.json"


def write_rank_layout(
    checkpoint: Path, rank: int, stores: Mapping[str, Store], files: Iterable[str]
) -> None:
    """Write one rank's list of pieces and files, which become durable; every rank for itself.

    Args:
        checkpoint: the directory.
        rank: whose list.
        stores: the kinds of optimizer state.
        files: what this rank has written, relative to ``checkpoint``.
    """
    lines = {
        name: {
            "file": store.file,
            "optimizer": store.optimizer,
            "pieces": [[p.name, p.buffer, p.offset, *astuple(p.block)] for p in store.pieces],
        }
        for name, store in stores.items()
    }
    records = {name: asdict(_sync_and_describe(checkpoint / name, rank)) for name in files}
    values = {"format": FORMAT, "stores": lines, "files": records}
    write_text(checkpoint / rank_file(rank), json.dumps(values, separators=(",", ":")) + "\n")


def read_rank_layout(checkpoint: Path, rank: int) -> dict[str, Store]:
    """Read one rank's list of pieces.

    Raises:
        DamagedCheckpointError: it is missing or is no such list.
    """
    path = checkpoint / rank_file(rank)
    values = _read_json(path)
    try:
        return {
            name: Store(
                store["file"],
                store["optimizer"],
                [Piece(n, b, o, Block(*block)) for n, b, o, *block in store["pieces"]],
            )
            for name, store in values["stores"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path} is no list of pieces: {error!r}") from None


def write_layout(
    checkpoint: Path, world_size: int, parameters: Mapping[str, ParameterRecord]
) -> None:
    """Write ``layout.json`` over every file present; one rank, after all others have written."""
    files: dict[str, Any] = {}
    for rank in range(world_size):
        files |= _read_json(checkpoint / rank_file(rank))["files"]
    for path in sorted(checkpoint.rglob("*")):  # ranks' lists, trainer state, offloaded tensors
        name = str(path.relative_to(checkpoint))
        if path.is_file() and name not in files and name != LAYOUT:
            files[name] = asdict(_sync_and_describe(path, 0))
    values = {
        "format": FORMAT,
        "world_size": world_size,
        "parameters": {
            name: {"shape": list(record.shape), "is_table": record.is_table}
            for name, record in parameters.items()
        },
        "files": files,
    }
    write_json(checkpoint / LAYOUT, {**values, "digest": _own_digest(values)})


def read_layout(checkpoint: Path) -> Layout:
    """Read ``layout.json`` without looking at the files it names.

    Raises:
        DamagedCheckpointError: it is missing, altered or no layout.
    """
    path = checkpoint / LAYOUT
    values = _read_json(path)
    if values.pop("digest", None) != _own_digest(values):
        raise DamagedCheckpointError(f"{path} is damaged: it is not what its own digest says")
    try:
        return Layout(
            values["world_size"],
            {
                name: ParameterRecord(tuple(p["shape"]), p["is_table"])
                for name, p in values["parameters"].items()
            },
            {name: FileRecord(**record) for name, record in values["files"].items()},
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path} is no layout: {error!r}") from None


def _own_digest(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{path} is missing: the checkpoint is incomplete") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, OSError) as error:
        raise DamagedCheckpointError(f"{path} is damaged: {error}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise DamagedCheckpointError(f"{path} is not a layout of format {FORMAT}")
    return values


def verify(checkpoint: Path, layout: Layout, rank: int, world_size: int) -> None:
    """Read this rank's share of a checkpoint once, every byte; all ranks together cover it.

    A rank takes the files that it wrote (of more writers than ranks, every P-th): at the same world
    size those that it is about to load. Pickles are opened by the restricted reader.

    Raises:
        DamagedCheckpointError: the first file that is missing, altered or unsafe.
    """
    mine = [name for name, record in layout.files.items() if record.rank % world_size == rank]
    check_files(checkpoint, layout, mine)
    for name in mine:
        if name.endswith(".pt"):
            safe_load(member(checkpoint, name))


def check_files(
    checkpoint: Path, layout: Layout, names: Iterable[str], verified: Collection[str] = ()
) -> None:
    """Compare files with what the layout recorded when they were written, to the last byte.

    Args:
        checkpoint: the directory.
        layout: its record.
        names: the files to look at.
        verified: those of them whose bytes need not be read once more.

    Raises:
        DamagedCheckpointError: a file is missing, short, altered or another checkpoint's; the
            message names it.
    """
    for name in names:
        path = member(checkpoint, name)
        if name not in layout.files:
            raise DamagedCheckpointError(
                f"{path} is not among the files that {checkpoint / LAYOUT} records"
            )
        expected = layout.files[name]
        if not path.exists():
            raise DamagedCheckpointError(f"{path} is missing: the checkpoint is incomplete")
        num_bytes = path.stat().st_size
        if num_bytes != expected.num_bytes:
            raise DamagedCheckpointError(
                f"{path} has {num_bytes} bytes, not the {expected.num_bytes} that were written: "
                "it is truncated or another checkpoint's"
            )
        try:
            same = _digest(path) == expected.digest
            bad = None if not same or name in verified else _first_bad_record(path)
        except Exception as error:  # the readers of a damaged zip raise many types
            raise DamagedCheckpointError(f"{path} is damaged: {error}") from None
        if not same:
            raise DamagedCheckpointError(
                f"{path} is not the file that this checkpoint wrote (contents differ from "
                f"{checkpoint / LAYOUT}): it is damaged or another checkpoint's"
            )
        if bad is not None:
            raise DamagedCheckpointError(
                f"{path} is damaged: the bytes of {bad} are not those that were written"
            )


def _sync_and_describe(path: Path, rank: int) -> FileRecord:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        return FileRecord(os.fstat(descriptor).st_size, _digest(path), rank)
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


def _first_bad_record(path: Path) -> str | None:
    """Name of the first record of a zip file whose bytes do not have its CRC; None if all do."""
    if not zipfile.is_zipfile(path):
        return None  # its digest is over its contents
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()
