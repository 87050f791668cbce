"""``manifest.json``: what a prepared directory holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ultramem_ds.data.indexed import bin_path, idx_path, mask_path
from ultramem_ds.data.units import Group, Split
from ultramem_ds.utils.files import read_json, write_json

MANIFEST_NAME = "manifest.json"
VALIDATION_DIRECTORY = "validation"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class SubsetInfo:
    """One (split, subset) of a prepared directory; also its sidecar ``PREFIX.json``."""

    subset: str
    split: Split
    documents: int
    tokens: int  # end-of-text ids included
    text_bytes: int  # UTF-8 bytes of the text, for bits per byte
    dtype: str
    sha256: str  # of the .bin
    tokenizer_hash: str
    eos_id: int
    source_files: tuple[str, ...]
    fingerprint: str  # of the preparation the pair belongs to
    masked: bool = False  # PREFIX.mask.bin says which ids count as targets
    answer_tokens: int = 0  # that do
    unended: int = 0  # documents that do not end in the end-of-text id (adopted ones)

    @property
    def group(self) -> Group:
        """(split, subset)."""
        return (self.split, self.subset)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token, end-of-text ids counted as tokens."""
        return self.text_bytes / self.tokens if self.tokens else 0.0


@dataclass(frozen=True, kw_only=True)
class TokenizerInfo:
    """The tokenizer a directory was prepared with; its file lies in the directory."""

    file: str
    hash: str  # SHA-256 of the file
    vocab_size: int  # one more than the largest id; a model needs at least this many rows
    eos_id: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents of ``manifest.json``, which is written last and makes a directory complete."""

    version: int
    fingerprint: str
    tokenizer: TokenizerInfo
    validation_share: float
    subsets: tuple[SubsetInfo, ...]
    records: int  # read, bad ones included
    bad_records: Mapping[str, int]  # reason -> records skipped
    duplicates: Mapping[str, Any]
    account: Mapping[str, Any] = field(default_factory=dict)  # of the inputs' files
    added: Mapping[str, Any] = field(default_factory=dict)  # held-out subsets that came later

    def of_split(self, split: Split) -> dict[str, SubsetInfo]:
        """Subsets that have documents in ``split``, by name, in order of name."""
        chosen = [info for info in self.subsets if info.split == split]
        return {info.subset: info for info in sorted(chosen, key=lambda info: info.subset)}

    def save(self, data_dir: Path) -> None:
        """Write ``manifest.json`` atomically."""
        write_json(data_dir / MANIFEST_NAME, asdict(self))


def prefix_of(data_dir: Path, group: Group) -> Path:
    """Path of a pair without ``.bin`` / ``.idx``."""
    split, subset = group
    return data_dir / VALIDATION_DIRECTORY / subset if split == "validation" else data_dir / subset


def sidecar_path(prefix: Path) -> Path:
    """``PREFIX.json``, written after the pair."""
    return prefix.with_name(prefix.name + ".json")


def is_complete(data_dir: Path, info: SubsetInfo) -> bool:
    """Whether the pair of ``info`` is there with the size it should have."""
    prefix = prefix_of(data_dir, info.group)
    itemsize = np.dtype(info.dtype).itemsize
    return (
        idx_path(prefix).is_file()
        and bin_path(prefix).is_file()
        and bin_path(prefix).stat().st_size == info.tokens * itemsize
        and (not info.masked or _size(mask_path(prefix)) == info.tokens)
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def load_sidecar(prefix: Path) -> SubsetInfo | None:
    """The sidecar of a finished pair, None where there is none."""
    path = sidecar_path(prefix)
    return _subset_from(read_json(path)) if path.is_file() else None


def _subset_from(value: Mapping[str, Any]) -> SubsetInfo:
    return SubsetInfo(**{**value, "source_files": tuple(value["source_files"])})


def load_manifest(data_dir: str | Path) -> Manifest:
    """Read a prepared directory's manifest.

    Raises:
        ValueError: if the directory is missing, empty, not (completely) prepared, torn, or of a
            newer format; the message says what to do.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise ValueError(f"data directory {data_dir} does not exist; make it with `prepare`")
    path = data_dir / MANIFEST_NAME
    if not path.is_file():
        raise ValueError(
            f"{data_dir} has no {MANIFEST_NAME}: not prepared, or not to the end; "
            "run `prepare --input ... --output` on it (again)"
        )
    value = read_json(path)
    try:
        if value["version"] != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {value['version']}, this program reads {FORMAT_VERSION}"
            )
        manifest = Manifest(
            **{
                **value,
                "tokenizer": TokenizerInfo(**value["tokenizer"]),
                "subsets": tuple(map(_subset_from, value["subsets"])),
            }
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a manifest of `prepare`: {error}") from error
    for info in manifest.subsets:
        if not is_complete(data_dir, info):
            raise ValueError(
                f"{prefix_of(data_dir, info.group)}.bin/.idx are missing or torn; repeat `prepare`"
            )
    return manifest
