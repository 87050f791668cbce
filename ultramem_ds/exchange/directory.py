"""Write an exported directory: whole, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultramem_ds import __version__
from ultramem_ds.checkpoint.directory import find_checkpoint, read_trainer_state, run_dir_of
from ultramem_ds.checkpoint.export import DTYPES, export_safetensors
from ultramem_ds.checkpoint.reader import CheckpointReader
from ultramem_ds.config.load import from_dict
from ultramem_ds.data.tokenizers import load_tokenizer
from ultramem_ds.exchange.architecture import FORMAT_VERSION, hf_config
from ultramem_ds.exchange.bundle import bundle
from ultramem_ds.exchange.card import model_card
from ultramem_ds.exchange.shards import WEIGHTS, write_shards
from ultramem_ds.exchange.tensors import exported_tensors, num_table_parts
from ultramem_ds.exchange.tokenizer_files import write_tokenizer
from ultramem_ds.utils.files import TEMPORARY_SUFFIX, fsync_directory, write_json, write_text

CONFIG = "config.json"
RUN = "ultramem_run.json"


@dataclass(frozen=True)
class Exported:
    """What has been written."""

    directory: Path
    files: list[str]
    num_bytes: int


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Fill ``path`` as a whole or not at all.

    Yields an empty directory beside it, which is renamed to ``path`` when the block ends and
    removed when it raises.

    Raises:
        ValueError: there is something at ``path`` already.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"--output {path} exists already; choose another")
    staging = path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}{TEMPORARY_SUFFIX}")
    staging.mkdir(parents=True)
    try:
        yield staging
        fsync_directory(staging)
        staging.rename(path)
        fsync_directory(path.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def export_hf(path: Path, output: Path, dtype: str, max_shard_bytes: int) -> Exported:
    """Export a checkpoint of any layout for transformers; see docs/export.md.

    Memory: one block of a tensor at a time.

    Args:
        path: a run directory or a checkpoint directory.
        output: the new directory.
        dtype: ``fp32`` or ``bf16``.
        max_shard_bytes: largest file; tables larger than it are cut.

    Raises:
        ValueError: the checkpoint is damaged, its tokenizer does not fit it, or ``output`` exists.
    """
    checkpoint = find_checkpoint(path)
    run_dir = run_dir_of(path)
    state = read_trainer_state(checkpoint)
    config = from_dict(state.config)
    tokenizer = load_tokenizer(run_dir)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer of {run_dir} has {tokenizer.vocab_size} entries, the model only "
            f"{config.model.vocab_size}: it is another model's"
        )
    reader = CheckpointReader(checkpoint)
    table_parts = num_table_parts(config, DTYPES[dtype], max_shard_bytes)
    dtype_name = str(DTYPES[dtype]).removeprefix("torch.")
    with new_directory(output) as staging:
        values = hf_config(
            config,
            dtype=dtype_name,
            tokenizer_vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            table_parts=table_parts,
        )
        write_json(staging / CONFIG, values)
        write_json(staging / "generation_config.json", _generation(values))
        write_tokenizer(tokenizer, staging, config.model.seq_len)
        for name, source in bundle().items():
            write_text(staging / name, source)
        run = {
            "format_version": FORMAT_VERSION,
            "ultramem_ds": __version__,
            "step": state.step,
            "consumed_samples": state.consumed_samples,
            "data_fingerprint": state.data_fingerprint,
            "tokenizer_hash": tokenizer.hash,
            "config": state.config,
        }
        write_json(staging / RUN, run)
        card = model_card(run_dir, state, config, dtype_name, tokenizer.vocab_size)
        write_text(staging / "README.md", card)
        tensors = exported_tensors(reader, config, DTYPES[dtype], table_parts)
        write_shards(staging, tensors, max_shard_bytes)
    return _exported(output)


def export_plain(path: Path, output: Path, dtype: str) -> Exported:
    """Export the one-process model's state dict as ``output/model.safetensors``.

    Raises:
        ValueError: the checkpoint is damaged, or ``output`` exists.
    """
    with new_directory(output) as staging:
        export_safetensors(path, staging / WEIGHTS, dtype)
    return _exported(output)


def _exported(directory: Path) -> Exported:
    files = sorted(path.name for path in directory.iterdir())
    return Exported(directory, files, sum((directory / name).stat().st_size for name in files))


def _generation(values: dict[str, Any]) -> dict[str, Any]:
    """``generation_config.json``: greedy by default; the vocabulary's padding is never chosen."""
    generation = {key: values[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    padding = list(range(values["tokenizer_vocab_size"], values["vocab_size"]))
    if padding:
        generation["suppress_tokens"] = padding
    return generation
