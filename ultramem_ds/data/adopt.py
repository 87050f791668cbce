"""A manifest for ``.bin/.idx`` pairs of other programs (Megatron-LM, GPT-NeoX, DeepSpeed)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from ultramem_ds.data.indexed import IndexedDataset
from ultramem_ds.data.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    VALIDATION_DIRECTORY,
    Manifest,
    SubsetInfo,
    TokenizerInfo,
)
from ultramem_ds.data.tokenizers import Tokenizer, load_tokenizer
from ultramem_ds.data.units import Split

_DECODE_DOCUMENTS = 256  # documents decoded at once


def adopt(data_dir: str | Path, tokenizer_path: str | Path) -> Manifest:
    """Make a directory of existing pairs readable by ``train``; the pairs stay as they are.

    Pairs directly in ``data_dir`` become training subsets named after their prefix, those in
    ``data_dir/validation`` held-out ones. Every id is checked against the tokenizer. Text is
    counted (for bits per byte) by decoding the held-out pairs; training pairs are not decoded and
    count 0 bytes.

    Raises:
        ValueError: if there is no pair, one is damaged or was made with a larger vocabulary, or the
            directory is one of ``prepare``'s already.
    """
    data_dir = Path(data_dir)
    if (data_dir / MANIFEST_NAME).exists():
        raise ValueError(f"{data_dir} has a {MANIFEST_NAME} already")
    tokenizer = load_tokenizer(str(tokenizer_path))
    infos = [
        _describe(path.with_suffix(""), split, tokenizer)
        for split, directory in _directories(data_dir)
        for path in sorted(directory.glob("*.idx"))
    ]
    if not infos:
        raise ValueError(f"{data_dir} holds no .bin/.idx pair")
    contents = "".join(f"{info.split}/{info.subset}:{info.sha256}\n" for info in infos)
    tokenizer.save(data_dir)
    manifest = Manifest(
        version=FORMAT_VERSION,
        fingerprint=hashlib.sha256(contents.encode()).hexdigest(),
        tokenizer=TokenizerInfo(
            file=tokenizer.file_name,
            hash=tokenizer.hash,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
        ),
        validation_share=0.0,
        subsets=tuple(infos),
        records=sum(info.documents for info in infos),
        bad_records={},
        duplicates={},
    )
    manifest.save(data_dir)
    return manifest


def _directories(data_dir: Path) -> Iterator[tuple[Split, Path]]:
    yield "train", data_dir
    yield "validation", data_dir / VALIDATION_DIRECTORY


def _describe(prefix: Path, split: Split, tokenizer: Tokenizer) -> SubsetInfo:
    dataset = IndexedDataset(prefix)
    dataset.check_layout()
    dataset.check_ids(tokenizer.vocab_size)
    return SubsetInfo(
        subset=prefix.name,
        split=split,
        documents=len(dataset),
        tokens=dataset.num_tokens,
        text_bytes=_text_bytes(dataset, tokenizer) if split == "validation" else 0,
        dtype=dataset.dtype.newbyteorder("=").name,
        sha256=dataset.sha256(),
        tokenizer_hash=tokenizer.hash,
        eos_id=tokenizer.eos_id,
        source_files=(),
        fingerprint="",
    )


def _text_bytes(dataset: IndexedDataset, tokenizer: Tokenizer) -> int:
    documents = iter(dataset)
    total = 0
    while batch := list(islice(documents, _DECODE_DOCUMENTS)):
        total += sum(len(tokenizer.decode(ids.tolist()).encode()) for ids in batch)
    return total
