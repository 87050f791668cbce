"""Whether a model and data speak of the same tokens: compared wherever the two meet.

Another tokenizer of the same size gives no error anywhere, only wrong numbers.
"""

from __future__ import annotations

import json
from pathlib import Path

from ultramem_ds.data.manifest import load_manifest
from ultramem_ds.data.tokenizers import HuggingFaceTokenizer, Tokenizer, load_tokenizer


def data_tokenizer(data_dir: str | Path) -> Tokenizer:
    """The tokenizer that prepared data was made with.

    Raises:
        ValueError: if the directory is not prepared, or its tokenizer was replaced since.
    """
    manifest = load_manifest(data_dir)
    tokenizer = load_tokenizer(Path(data_dir))
    file = Path(data_dir) / tokenizer.file_name
    if tokenizer.hash != manifest.tokenizer.hash:
        raise ValueError(
            f"{file} is not the tokenizer that the data was made with (sha256 "
            f"{tokenizer.hash[:12]}, {Path(data_dir) / 'manifest.json'} says "
            f"{manifest.tokenizer.hash[:12]}); put that one back, or repeat `prepare`"
        )
    if tokenizer.eos_id != manifest.tokenizer.eos_id:
        source = tokenizer.end_of_text.source
        name = source or "tokenizer_config.json"
        raise ValueError(
            f"{source or file} says that id {tokenizer.eos_id} ends a text, but the data was made "
            f"with id {manifest.tokenizer.eos_id}; put the old {Path(data_dir) / name} back, "
            f"remove it if there was none, or repeat `prepare`"
        )
    return tokenizer


def require_same_tokenizer(trained: str | Path, data_dir: str | Path) -> Tokenizer:
    """Check that prepared data was made with the tokenizer of a model.

    Args:
        trained: a directory with the model's tokenizer: a run, or an exported model.
        data_dir: prepared data.

    Returns:
        The data's tokenizer.

    Raises:
        ValueError: naming both files, if the tokenizers or their end-of-text ids differ.
    """
    return require_same(trained, data_tokenizer(data_dir), data_dir)


def require_same(trained: str | Path, other: Tokenizer, place: str | Path) -> Tokenizer:
    """Check a tokenizer that is in use at ``place``, its file or directory, against a model's.

    Raises:
        ValueError: as :func:`require_same_tokenizer`.
    """
    own = load_tokenizer(Path(trained))
    file = Path(place) / other.file_name if Path(place).is_dir() else Path(place)
    if _entries(own) != _entries(other):
        raise ValueError(
            f"{file} is another tokenizer (sha256 {other.hash[:12]}) than "
            f"{Path(trained) / own.file_name} (sha256 {own.hash[:12]}), which the model was "
            "trained with: prepare the data with that one"
        )
    if own.eos_id != other.eos_id:
        raise ValueError(
            f"{file} ends texts in id {other.eos_id}, "
            f"{Path(trained) / own.file_name} in {own.eos_id}: prepare the data with --eod-token "
            f"{own.end_of_text.token!r}"
        )
    return other


def _entries(tokenizer: Tokenizer) -> object:
    """What decides the ids: files that differ in layout, truncation or padding are the same."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.hash
    description = json.loads(tokenizer.content)
    return {k: v for k, v in description.items() if k not in ("truncation", "padding", "version")}
