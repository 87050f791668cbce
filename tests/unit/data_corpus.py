"""Small corpora in the layouts of the real ones, for the tests of the data pipeline."""

from __future__ import annotations

import functools
import gzip
import json
import random
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from ultramem_ds.data.manifest import load_manifest, prefix_of
from ultramem_ds.data.tokenizer_training import train_tokenizer
from ultramem_ds.data.tokenizers import Tokenizer

_WORDS = "the memory layer reads rows of a table and adds them to café 東京 x = y + 1; <eos>\n"


def make_text(seed: int, words: int = 40) -> str:
    """A text of its own for every seed."""
    chooser = random.Random(seed)
    return f"{seed} " + " ".join(chooser.choices(_WORDS.split(" "), k=words))


def make_texts(first: int, count: int) -> list[str]:
    return [make_text(seed, 5 + seed % 60) for seed in range(first, first + count)]


def lines_of(rows: Iterable[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write(path: Path, content: bytes) -> Path:
    """Write ``content``, compressed as the suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        # Two frames, as `zstd` writes for concatenated inputs.
        half = len(content) // 2
        codec = pyarrow.Codec("zstd")
        content = b"".join(
            codec.compress(part, asbytes=True) for part in (content[:half], content[half:])
        )
    path.write_bytes(content)
    return path


def write_redpajama(root: Path, documents: int = 60) -> dict[str, list[str]]:
    """RedPajama-1T's layout; returns the texts of every subset."""
    texts = {
        name: make_texts(1000 * number, documents)
        for number, name in enumerate(
            ("common_crawl", "c4", "github", "arxiv", "wikipedia", "stackexchange")
        )
    }
    half = documents // 2
    crawl = [{"text": text, "pred_label": "__label__wiki"} for text in texts["common_crawl"]]
    write(
        root / "common_crawl/2019-30/en_head_0000.json.gz.dedup.classifier.jsonl.zst",
        lines_of(crawl[:half]),
    )
    write(
        root / "common_crawl/2020-05/en_middle_0001.json.gz.dedup.classifier.jsonl.zst",
        lines_of(crawl[half:]),
    )
    for name, files in {
        "c4": ["c4-train.00000-of-01024.jsonl", "c4-train.00001-of-01024.jsonl"],
        "github": ["filtered_a.sampled.jsonl", "filtered_b.sampled.jsonl"],
        "arxiv": ["arxiv_0.jsonl", "arxiv_1.jsonl"],
        "wikipedia": ["wiki.jsonl"],
        "stackexchange": ["stackexchange.jsonl"],
    }.items():
        rows = [{"text": text, "meta": {"source": name}} for text in texts[name]]
        parts = [rows[:half], rows[half:]] if len(files) == 2 else [rows]
        for file, part in zip(files, parts):
            write(root / name / file, lines_of(part))
    return texts


@functools.cache
def small_tokenizer() -> Tokenizer:
    """Byte-level BPE of 400 entries."""
    return train_tokenizer(make_texts(0, 200), kind="bpe", vocab_size=400)


def write_tokenizer(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return small_tokenizer().save(directory)


def read_megatron(prefix: Path) -> list[np.ndarray]:
    """Documents of a pair: Megatron-LM's layout, written from its specification alone."""
    index = Path(f"{prefix}.idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    (version,) = struct.unpack_from("<Q", index, 9)
    (code,) = struct.unpack_from("<B", index, 17)
    (sequences,) = struct.unpack_from("<Q", index, 18)
    (entries,) = struct.unpack_from("<Q", index, 26)
    assert version == 1
    dtype = {4: np.dtype("<i4"), 8: np.dtype("<u2")}[code]
    lengths = struct.unpack_from(f"<{sequences}i", index, 34)
    pointers = struct.unpack_from(f"<{sequences}q", index, 34 + 4 * sequences)
    documents = struct.unpack_from(f"<{entries}q", index, 34 + 12 * sequences)
    assert len(index) == 34 + 12 * sequences + 8 * entries
    assert list(documents) == list(range(sequences + 1))
    data = Path(f"{prefix}.bin").read_bytes()
    return [
        np.frombuffer(data[start : start + length * dtype.itemsize], dtype)
        for start, length in zip(pointers, lengths)
    ]


def write_megatron(
    prefix: Path, documents: Sequence[Sequence[int]], *, code: int, dtype: str
) -> None:
    """Inverse of :func:`read_megatron`, for any code and element type."""
    itemsize = np.dtype(dtype).itemsize
    pointers, at = [], 0
    for document in documents:
        pointers.append(at)
        at += len(document) * itemsize
    count = len(documents)
    Path(f"{prefix}.bin").write_bytes(
        b"".join(np.asarray(document, dtype).tobytes() for document in documents)
    )
    Path(f"{prefix}.idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, count, count + 1)
        + struct.pack(f"<{count}i", *map(len, documents))
        + struct.pack(f"<{count}q", *pointers)
        + struct.pack(f"<{count + 1}q", *range(count + 1))
    )


def texts_by_group(data_dir: Path) -> dict[tuple[str, str], list[str]]:
    """Decoded documents of every (split, subset), read by the independent reader."""
    tokenizer = small_tokenizer()
    result = {}
    for info in load_manifest(data_dir).subsets:
        documents = read_megatron(prefix_of(data_dir, info.group))
        assert all(ids[-1] == tokenizer.eos_id for ids in documents)
        result[info.group] = [tokenizer.decode(ids[:-1].tolist()) for ids in documents]
    return result


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below ``directory``."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
