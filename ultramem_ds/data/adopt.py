"""A manifest for ``.bin/.idx`` pairs of other programs (Megatron-LM, GPT-NeoX, DeepSpeed)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from ultramem_ds.data.indexed import (
    IndexedDataset,
    IndexedWriter,
    bin_path,
    id_dtype,
    idx_path,
)
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

MissingEod: TypeAlias = Literal["refuse", "add", "accept"]

_DECODE_DOCUMENTS = 256  # documents decoded at once


def adopt(
    data_dir: str | Path,
    tokenizer_path: str | Path,
    *,
    eod_token: str | None = None,
    missing_eod: MissingEod = "refuse",
) -> Manifest:
    """Make a directory of existing pairs readable by ``train``; the pairs stay as they are.

    Pairs directly in ``data_dir`` become training subsets named after their prefix, those in
    ``data_dir/validation`` held-out ones. Every id is checked against the tokenizer, and every
    document for its end-of-text id. Text is counted (for bits per byte) by decoding the held-out
    pairs; training pairs are not decoded and count 0 bytes.

    Args:
        data_dir: holds the pairs.
        tokenizer_path: anything that ``load_tokenizer`` takes.
        eod_token: see ``load_tokenizer``.
        missing_eod: what to do where documents do not end in the end-of-text id: refuse them,
            ``add`` the id (the pair is rewritten), or ``accept`` them.

    Raises:
        ValueError: if there is no pair, one is damaged or was made with a larger vocabulary, its
            documents do not end, or the directory is one of ``prepare``'s already.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise ValueError(f"{data_dir} does not exist; --output names the directory of the pairs")
    if (data_dir / MANIFEST_NAME).exists():
        raise ValueError(f"{data_dir} has a {MANIFEST_NAME} already")
    tokenizer = load_tokenizer(str(tokenizer_path), eod_token)
    prefixes = [
        (path.with_suffix(""), split)
        for split, directory in _directories(data_dir)
        for path in sorted(directory.glob("*.idx"))
    ]
    if not prefixes:
        raise ValueError(f"{data_dir} holds no .bin/.idx pair")
    _refuse_halves(data_dir)
    unended = {prefix: _unended(prefix, tokenizer, missing_eod) for prefix, _ in prefixes}
    if missing_eod == "add":
        for prefix, count in unended.items():
            if count:
                _end_documents(prefix, tokenizer)
                unended[prefix] = 0
    infos = [_describe(prefix, split, tokenizer, unended[prefix]) for prefix, split in prefixes]
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


def _refuse_halves(data_dir: Path) -> None:
    """A .bin whose index is missing would be left out without a word."""
    for _, directory in _directories(data_dir):
        for path in sorted(directory.glob("*.bin")):
            if not path.with_suffix(".idx").is_file() and not path.name.endswith(".mask.bin"):
                raise ValueError(f"{path} has no index {path.stem}.idx; add it, or move the file")


def _unended(prefix: Path, tokenizer: Tokenizer, missing_eod: MissingEod) -> int:
    """Check a pair; documents in it that do not end in the end-of-text id."""
    dataset = IndexedDataset(prefix)
    dataset.check_layout()
    dataset.check_ids(tokenizer.vocab_size)
    count = dataset.num_not_ending_in(tokenizer.eos_id)
    if count and missing_eod == "refuse":
        documents = len(dataset.document_index) - 1
        raise ValueError(
            f"{count:,} of the {documents:,} documents of {prefix} do not end in the end-of-text "
            f"id {tokenizer.eos_id} ({tokenizer.end_of_text.token}): give another --eod-token, "
            "--add-eod to rewrite the pair with it, or --accept-no-eod to take them as they are"
        )
    return count


def _end_documents(prefix: Path, tokenizer: Tokenizer) -> None:
    """Rewrite a pair with the end-of-text id after every document that lacks it."""
    dataset = IndexedDataset(prefix)
    rewritten = prefix.with_name(f"{prefix.name}.ended")
    with IndexedWriter(rewritten, id_dtype(tokenizer.vocab_size)) as out:
        for number in range(len(dataset.document_index) - 1):
            first, end = dataset.document_index[number : number + 2].tolist()
            ids = [dataset[sequence] for sequence in range(first, end)]
            document = np.concatenate([*ids, np.empty(0, np.int64)])
            if not len(document) or document[-1] != tokenizer.eos_id:
                document = np.append(document, tokenizer.eos_id)
            out.add(document.astype(np.int64))
    for path_of in (bin_path, idx_path):
        os.replace(path_of(rewritten), path_of(prefix))


def _describe(prefix: Path, split: Split, tokenizer: Tokenizer, unended: int) -> SubsetInfo:
    dataset = IndexedDataset(prefix)
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
        unended=unended,
    )


def _text_bytes(dataset: IndexedDataset, tokenizer: Tokenizer) -> int:
    documents = iter(dataset)
    total = 0
    while batch := list(islice(documents, _DECODE_DOCUMENTS)):
        total += sum(len(tokenizer.decode(ids.tolist()).encode()) for ids in batch)
    return total
