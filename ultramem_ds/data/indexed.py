r"""Megatron-LM's indexed dataset: ids in ``PREFIX.bin``, where each sequence is in ``PREFIX.idx``.

Layout of the index, little endian (Megatron-LM ``megatron/core/datasets/indexed_dataset.py``)::

    9 bytes   magic  MMIDIDX\0\0
    uint64    version, 1
    uint8     dtype code of the ids in .bin: 4 = int32, 8 = uint16
    uint64    number of sequences, n
    uint64    number of entries of the document index, d
    int32[n]  tokens of each sequence
    int64[n]  byte offset of each sequence in .bin
    int64[d]  document index: document k is sequences [index[k], index[k + 1])

Here one document is one sequence, so d = n + 1 and the document index counts 0..n. Everything is
read through memory maps: opening costs the same for one document and for a billion.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ultramem_ds.utils.files import atomic_file

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_CODES = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}
# Element types a code may stand for, Megatron-LM's reading first. DeepSpeed's own
# indexed_dataset writes 6 for uint16 (Megatron: float64) and 8 for uint64; sizes decide.
_READINGS = {
    1: (np.uint8,),
    2: (np.int8,),
    3: (np.int16,),
    4: (np.int32,),
    5: (np.int64,),
    6: (np.uint16,),
    8: (np.uint16, np.uint64),
}
# Megatron-LM's own threshold for two-byte ids.
_MAX_UINT16_VOCAB = 65_500
_HASH_BYTES = 16 << 20
_INDEX_BLOCK = 1 << 20  # entries of the index arrays held in memory while they are written

IntArray = npt.NDArray[np.integer[Any]]


def id_dtype(vocab_size: int) -> np.dtype[Any]:
    """Element type for ids of a vocabulary: uint16 where they fit, else int32."""
    return np.dtype(np.uint16 if vocab_size < _MAX_UINT16_VOCAB else np.int32)


def bin_path(prefix: Path) -> Path:
    """``PREFIX.bin`` (prefixes may contain dots)."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """``PREFIX.idx``."""
    return prefix.with_name(prefix.name + ".idx")


def mask_path(prefix: Path) -> Path:
    """``PREFIX.mask.bin``: a uint8 for every id of ``PREFIX.bin``, 1 if it counts as a target."""
    return prefix.with_name(prefix.name + ".mask.bin")


def open_mask(prefix: Path) -> npt.NDArray[np.uint8]:
    """The mask of a pair, through a memory map."""
    return np.memmap(mask_path(prefix), dtype=np.uint8, mode="r")


def write_index(
    path: Path, dtype: np.dtype[Any], num_documents: int, lengths: Iterable[IntArray]
) -> None:
    """Write ``path`` (an ``.idx``) for documents of the given lengths, streaming.

    Args:
        path: the index file, written atomically.
        dtype: element type of the ids in the ``.bin``.
        num_documents: total of all entries of ``lengths``.
        lengths: tokens per document, in blocks; re-iterated once, so a sequence or a re-iterable.
    """
    with atomic_file(path) as out:
        out.write(_HEADER.pack(MAGIC, 1, _CODES[dtype], num_documents, num_documents + 1))
        written = 0
        for block in lengths:
            out.write(np.asarray(block, dtype="<i4").tobytes())
            written += len(block)
        assert written == num_documents, f"{written} lengths for {num_documents} documents"
        offset = 0
        for block in lengths:
            ends = offset + np.cumsum(block, dtype=np.int64) * dtype.itemsize
            starts = np.concatenate([np.array([offset]), ends])[: len(block)]
            out.write(starts.astype("<i8").tobytes())
            offset = int(ends[-1]) if len(block) else offset
        for begin in range(0, num_documents + 1, _INDEX_BLOCK):
            end = min(begin + _INDEX_BLOCK, num_documents + 1)
            out.write(np.arange(begin, end, dtype="<i8").tobytes())


class IndexedWriter:
    """Writes one ``.bin/.idx`` pair, document by document, in the layout of this module.

    Use as a context manager: the two files appear together when the block ends and not at all
    when it raises. Lengths are kept in memory (4 bytes a document); ``prepare`` streams instead.
    """

    def __init__(self, prefix: Path, dtype: npt.DTypeLike) -> None:
        self._prefix = prefix
        self._dtype = np.dtype(dtype)
        if self._dtype not in _CODES:
            raise ValueError(f"ids are stored as uint16 or int32, not {self._dtype}")
        self._lengths: list[int] = []
        self._stack = ExitStack()
        self._out: BinaryIO

    def __enter__(self) -> IndexedWriter:
        self._out = self._stack.enter_context(atomic_file(bin_path(self._prefix)))
        return self

    def add(self, ids: npt.ArrayLike) -> None:
        """Append one document.

        Raises:
            ValueError: if an id does not fit the element type.
        """
        array = np.asarray(ids)
        limits = np.iinfo(self._dtype)
        if array.size and not (limits.min <= array.min() and array.max() <= limits.max):
            raise ValueError(f"{bin_path(self._prefix)}: a token id does not fit {self._dtype}")
        self._out.write(array.astype(self._dtype).tobytes())
        self._lengths.append(array.size)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        if error is None:
            blocks = [np.asarray(self._lengths, dtype=np.int32)]
            write_index(idx_path(self._prefix), self._dtype, len(self._lengths), blocks)


class IndexedDataset:
    """Memory-mapped reader of a ``.bin/.idx`` pair.

    Goals: opens a file of any size at once, holds nothing of its size in memory, travels to worker
    processes by its path alone (picklable), and never reads a wrong or torn pair silently.

    ``dataset[i]`` is document i's ids; :meth:`tokens` reads the whole ``.bin`` as one stream.

    Args:
        prefix: path without ``.bin`` / ``.idx``.
        random_access: sequences will be read in no order, so the kernel need not read ahead.

    Raises:
        ValueError: if the pair is missing, torn, of an unknown version, of an element type that
            its sizes contradict.
    """

    def __init__(self, prefix: str | Path, *, random_access: bool = False) -> None:
        self.prefix = Path(prefix)
        self._random_access = random_access
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        return {"prefix": self.prefix, "_random_access": self._random_access}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _map(self, path: Path, dtype: npt.DTypeLike) -> IntArray:
        if path.stat().st_size == 0:  # which cannot be mapped
            return np.empty(0, dtype=dtype)
        mapped = np.memmap(path, dtype=dtype, mode="r")
        if self._random_access:
            # Read-ahead (up to 8 MB a fault on some disks) would be for nothing.
            mapped._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
        return mapped

    def _open(self) -> None:
        index_path, data_path = idx_path(self.prefix), bin_path(self.prefix)
        for path in (index_path, data_path):
            if not path.is_file():
                raise ValueError(f"{path} does not exist")
        index_bytes, data_bytes = index_path.stat().st_size, data_path.stat().st_size
        with open(index_path, "rb") as file:
            header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(MAGIC):
            raise ValueError(f"{index_path} is not an indexed dataset (magic bytes differ)")
        _, version, code, num_sequences, num_entries = _HEADER.unpack(header)
        if version != 1:
            raise ValueError(f"{index_path}: version {version} is not supported, only 1")
        expected = _HEADER.size + num_sequences * 12 + num_entries * 8
        if index_bytes < expected:  # Megatron's multimodal files append one byte per sequence
            raise ValueError(
                f"{index_path} is torn: {index_bytes} bytes, its header says {expected}"
            )
        if num_entries < 1:
            raise ValueError(f"{index_path} has no document index")
        raw = self._map(index_path, np.uint8)
        at = _HEADER.size
        self.lengths: IntArray = raw[at : at + 4 * num_sequences].view("<i4")
        at += 4 * num_sequences
        self.offsets: IntArray = raw[at : at + 8 * num_sequences].view("<i8")
        at += 8 * num_sequences
        self.document_index: IntArray = raw[at : at + 8 * num_entries].view("<i8")
        self.dtype = self._element_type(code, data_bytes)
        self.num_tokens = data_bytes // self.dtype.itemsize
        self._ids = self._map(data_path, self.dtype)

    def _element_type(self, code: int, data_bytes: int) -> np.dtype[Any]:
        """The reading of ``code`` under which the last sequence ends where ``.bin`` does."""
        for candidate in _READINGS.get(code, ()):
            size = np.dtype(candidate).itemsize
            num_sequences = len(self.lengths)
            end = int(self.offsets[-1]) + int(self.lengths[-1]) * size if num_sequences else 0
            # One more sequence tells element sizes apart when the last one is empty.
            middle = num_sequences // 2
            joined = (
                num_sequences < 2
                or middle == 0
                or int(self.offsets[middle])
                == int(self.offsets[middle - 1]) + size * int(self.lengths[middle - 1])
            )
            if end == data_bytes and joined:
                return np.dtype(candidate).newbyteorder("<")
        raise ValueError(
            f"{bin_path(self.prefix)} ({data_bytes} bytes) does not fit its index: dtype code "
            f"{code}, {len(self.lengths)} sequences. The pair is torn or not Megatron-LM's"
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> IntArray:
        """Ids of document ``index``, a view of the memory map."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        begin = int(self.offsets[index]) // self.dtype.itemsize
        return self._ids[begin : begin + int(self.lengths[index])]

    def __iter__(self) -> Iterator[IntArray]:
        return (self[index] for index in range(len(self)))

    def tokens(self, begin: int, end: int) -> IntArray:
        """Ids [begin, end) of the concatenation of all documents, a view of the memory map."""
        return self._ids[begin:end]

    def document_starts(self, begin: int, end: int) -> IntArray:
        """Positions in [begin, end) of the concatenation at which a document starts, ascending.

        Binary search through the memory maps: about 2 log2(documents) pages are touched. (Not
        ``np.searchsorted``, which would first copy these unaligned arrays whole.)
        """
        size = self.dtype.itemsize
        first = bisect_left(self.offsets, begin * size)
        last = bisect_left(self.offsets, end * size, lo=first)
        documents = slice(
            bisect_left(self.document_index, first), bisect_left(self.document_index, last)
        )
        return np.asarray(self.offsets[self.document_index[documents]]) // size

    def check_ids(self, vocab_size: int, block: int = 1 << 24) -> None:
        """Read every id.

        Raises:
            ValueError: if one is negative or not below ``vocab_size``.
        """
        for begin in range(0, self.num_tokens, block):
            ids = self.tokens(begin, begin + block)
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= vocab_size:
                raise ValueError(
                    f"{bin_path(self.prefix)} has token id {low if low < 0 else high}, outside the "
                    f"tokenizer's {vocab_size} entries: it was made with another tokenizer"
                )

    def num_not_ending_in(self, token: int, block: int = 1 << 20) -> int:
        """Documents, in the sense of the document index, whose last id is not ``token``."""
        count = 0
        for begin in range(0, len(self.document_index) - 1, block):
            edges = np.array(self.document_index[begin : begin + block + 1], dtype=np.int64)
            last = edges[1:] - 1  # sequence
            last = last[edges[1:] > edges[:-1]]
            ends = np.array(self.offsets[last]) // self.dtype.itemsize + self.lengths[last]
            filled = np.array(self.lengths[last]) > 0
            count += len(edges) - 1 - int((self._ids[ends[filled] - 1] == token).sum())
        return count

    def check_layout(self, block: int = 1 << 20) -> None:
        """Read the whole index.

        Raises:
            ValueError: if a sequence does not start where the one before it ends, or the document
                index does not run from 0 to the number of sequences.
        """
        size = self.dtype.itemsize
        for begin in range(0, len(self), block):
            # One sequence of overlap, so that the seam between blocks is looked at too.
            low = max(begin - 1, 0)
            offsets = np.array(self.offsets[low : begin + block])
            ends = offsets + np.array(self.lengths[low : begin + block], dtype=np.int64) * size
            if not np.array_equal(offsets[1:], ends[:-1]) or (ends < offsets).any():
                raise ValueError(f"{idx_path(self.prefix)}: sequences leave gaps or overlap")
        for begin in range(0, len(self.document_index), block):
            entries = np.array(self.document_index[max(begin - 1, 0) : begin + block])
            if (np.diff(entries) < 0).any():
                raise ValueError(f"{idx_path(self.prefix)}: the document index is not ascending")
        if int(self.document_index[0]) != 0 or int(self.document_index[-1]) != len(self):
            raise ValueError(f"{idx_path(self.prefix)}: the document index is not complete")

    def sha256(self) -> str:
        """SHA-256 of the ``.bin``, hexadecimal."""
        digest = hashlib.sha256()
        with open(bin_path(self.prefix), "rb") as file:
            while block := file.read(_HASH_BYTES):
                digest.update(block)
        return digest.hexdigest()
