"""Read an exported directory back into a run directory, for any number of ranks.

The new run is at step 0: weights are what they were, bit by bit (masters of an fp32 export; those
of a bf16 export are its rounded values), Adam's moments are zero, and its schedule begins anew.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ultramem_ds.checkpoint.directory import LATEST, TRAINER, TrainerState, checkpoints_dir, tag_of
from ultramem_ds.checkpoint.parameters import parameter_records
from ultramem_ds.checkpoint.record import ParameterRecord, Store, write_layout, write_rank_layout
from ultramem_ds.checkpoint.state import KINDS, MASTER
from ultramem_ds.checkpoint.weights import WeightSource
from ultramem_ds.config.load import to_dict
from ultramem_ds.config.schema import Config
from ultramem_ds.data.tokenizers import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from ultramem_ds.exchange.architecture import training_config
from ultramem_ds.exchange.directory import CONFIG, RUN, new_directory
from ultramem_ds.exchange.released import CONFIG as RELEASED
from ultramem_ds.exchange.released import open_released
from ultramem_ds.exchange.shards import ShardReader
from ultramem_ds.exchange.weights import ExportedWeights
from ultramem_ds.sharding.blocks import Block, Piece
from ultramem_ds.utils.files import read_json, write_json, write_text

CHUNK_ELEMENTS = 1 << 22  # converted at a time
ZERO = "zero"  # what a checkpoint calls the store of the main optimizer


@dataclass(frozen=True)
class Source:
    """A model that can be read."""

    config: Config
    weights: WeightSource
    tokenizer: Tokenizer | None


def import_model(source: Path, run_dir: Path, world_size: int) -> Path:
    """Write a run directory whose only checkpoint holds the model of ``source``.

    Memory: one block at a time, and the mapped files; a scratch copy of one rank's masters lies in
    the run directory while it is written.

    Args:
        source: an exported directory, or a released checkpoint (:mod:`exchange.released`).
        run_dir: the new run directory.
        world_size: ranks P whose files are written; training may use any number.

    Returns:
        The checkpoint.

    Raises:
        ValueError: ``source`` is no such directory or is damaged, or ``run_dir`` exists.
    """
    if world_size < 1:
        raise ValueError(f"--world-size {world_size} must be at least 1")
    return write_run(open_source(source), run_dir, world_size)


def open_source(source: Path) -> Source:
    """Open an exported directory, or one of the authors' released layout.

    Raises:
        ValueError: it is neither, or damaged.
    """
    if not source.is_dir():
        raise ValueError(f"--input {source}: no such directory")
    if not (source / RELEASED).is_file():
        return open_exported(source)
    config, weights = open_released(source)
    files = (HuggingFaceTokenizer.file_name, SentencePieceTokenizer.file_name)
    present = any((source / file).is_file() for file in files)
    return Source(config, weights, load_tokenizer(source) if present else None)


def open_exported(source: Path, option: str = "--input") -> Source:
    """Check an exported directory against itself, reading no weights.

    Args:
        source: the directory.
        option: how it was given, for messages.

    Raises:
        ValueError: for the first thing that does not fit.
    """
    if not source.is_dir():
        raise ValueError(f"{option} {source}: no such directory")
    if not (source / CONFIG).is_file():
        raise ValueError(f"{source} has no {CONFIG}: it is no exported model")
    values = read_json(source / CONFIG)
    run = _run_record(source)
    try:
        config = training_config(values, run.get("config"))
    except ValueError as error:
        raise ValueError(f"{source / CONFIG}: {error}") from None
    tokenizer = load_tokenizer(source)
    entries, stated = tokenizer.vocab_size, values.get("tokenizer_vocab_size")
    if entries != stated:
        raise ValueError(
            f"the tokenizer in {source} has {entries} entries, {CONFIG} says {stated}: it is "
            "another model's; put the exported one back"
        )
    weights = ExportedWeights(ShardReader(source), config, values)
    return Source(config, weights, tokenizer)


def _run_record(source: Path) -> dict[str, Any]:
    """``ultramem_run.json``; empty where another program has saved the model since."""
    if not (source / RUN).is_file():
        return {}
    record = read_json(source / RUN)
    if not isinstance(record, dict):
        raise ValueError(f"{source / RUN} does not hold a JSON object")
    return record


def write_run(model: Source, run_dir: Path, world_size: int) -> Path:
    """Write the run directory; see :func:`import_model`."""
    config = model.config
    records = parameter_records(config)
    tag = tag_of(0)
    with new_directory(run_dir) as staging:
        checkpoint = checkpoints_dir(staging) / tag
        checkpoint.mkdir(parents=True)
        files = ["mp_rank_00_model_states.pt"]
        torch.save(_model_states(model.weights), checkpoint / files[0])
        for rank in range(world_size):
            pieces = pieces_of(records, rank, world_size)
            file = f"imported_rank_{rank:05d}.pt"
            _write_masters(checkpoint / file, pieces, model.weights)
            stores = {ZERO: Store(file, "imported", pieces)}
            write_rank_layout(checkpoint, rank, stores, [file, *files])
            files = []
        state = TrainerState(
            step=0,
            consumed_samples=0,
            data_fingerprint="",
            world_size=world_size,
            partition="",
            zero_stage=0,
            config=to_dict(config),
        )
        write_json(checkpoint / TRAINER, asdict(state))
        write_layout(checkpoint, world_size, records)
        write_json(staging / "config.json", state.config)
        if model.tokenizer is not None:
            model.tokenizer.save(staging)
        write_text(checkpoints_dir(staging) / LATEST, tag + "\n")
    return checkpoints_dir(run_dir) / tag


def pieces_of(records: dict[str, ParameterRecord], rank: int, world_size: int) -> list[Piece]:
    """What ``rank`` holds: of every parameter a run of rows, each in a buffer of its own."""
    pieces: list[Piece] = []
    for name, record in records.items():
        block = record.block
        rows = -(-block.num_rows // world_size)
        held = min(rows, block.num_rows - rank * rows)
        if held > 0:
            part = Block(rank * rows, held, 0, block.num_columns)
            pieces.append(Piece(name, len(pieces), 0, part))
    return pieces


def _write_masters(path: Path, pieces: list[Piece], weights: WeightSource) -> None:
    """One rank's file; masters pass through scratch files, so that memory stays bounded."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tmp-") as scratch:
        masters = []
        for piece in pieces:
            name = str(Path(scratch) / str(piece.buffer))
            numel = piece.block.numel
            master = torch.from_file(name, shared=True, size=numel, dtype=torch.float32)
            out_RC = piece.view(master)
            for part, out in _chunks(piece.block, out_RC):
                weights.read(piece.name, part, out)
            masters.append(master)
        zeros = [torch.zeros(1).expand(piece.block.numel) for piece in pieces]
        flats = {kind: masters if kind == MASTER else zeros for kind in KINDS}
        torch.save({"flats": flats, "step": 0}, path)


def _chunks(block: Block, out_RC: Tensor) -> Iterator[tuple[Block, Tensor]]:
    step = max(1, CHUNK_ELEMENTS // block.num_columns)
    for first in range(0, block.num_rows, step):
        out = out_RC[first : first + step]
        yield Block(block.first_row + first, len(out), 0, block.num_columns), out


def _model_states(weights: WeightSource) -> dict[str, Any]:
    """What DeepSpeed's model file would say of a model that has not been trained yet."""
    buffers = weights.buffers()
    counters = dict.fromkeys(("global_steps", "global_samples", "skipped_steps"), 0)
    return {"module": buffers, "buffer_names": list(buffers), **counters}


def describe(run_dir: Path) -> str:
    """What there is to say of a run directory that has been written."""
    config = json.loads((run_dir / "config.json").read_text())
    said = f"{run_dir}: {config['model']['kind']}, step 0, Adam's moments zero"
    files = (HuggingFaceTokenizer.file_name, SentencePieceTokenizer.file_name)
    if any((run_dir / file).is_file() for file in files):
        return said
    return f"{said}; there was no tokenizer: copy tokenizer.json there before generating"
