"""Held-out sequences, subset by subset, in stored order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ultramem_ds.data.indexed import IndexedDataset, open_mask
from ultramem_ds.data.manifest import load_manifest, prefix_of
from ultramem_ds.data.micro_batch import Boundaries, MicroBatch, document_starts
from ultramem_ds.data.mixture import IdArray, num_sequences


def validation_subsets(data_dir: str | Path) -> list[str]:
    """Names of the subsets with held-out documents, in order of name."""
    return list(load_manifest(data_dir).of_split("validation"))


class ValidationSet:
    """Held-out sequences of one subset: documents concatenated, the last partial sequence dropped.

    ``dataset[i]`` is (S + 1,) int64. A split shorter than one sequence has length 0.

    Raises:
        ValueError: if the directory is not prepared or has no such subset.
    """

    def __init__(self, data_dir: str | Path, subset: str, seq_len: int) -> None:
        infos = load_manifest(data_dir).of_split("validation")
        if subset not in infos:
            raise ValueError(
                f"{data_dir} has no validation split of {subset!r}, "
                f"only of {', '.join(infos) or 'no subset'}"
            )
        self.subset = subset
        self.seq_len = seq_len
        self.info = infos[subset]
        prefix = prefix_of(Path(data_dir), ("validation", subset))
        self._dataset = IndexedDataset(prefix)
        self._mask = open_mask(prefix) if self.info.masked else None

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token: bits per byte = loss / (ln 2 * this)."""
        return self.info.bytes_per_token

    def __len__(self) -> int:
        return num_sequences(self._dataset.num_tokens, self.seq_len)

    def __getitem__(self, index: int) -> IdArray:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        begin = index * self.seq_len
        return self._dataset.tokens(begin, begin + self.seq_len + 1).astype(np.int64)

    def batch(self, indices: Sequence[int], boundaries: Boundaries) -> MicroBatch:
        """Sequences ``indices`` as one forward, told of documents as training was."""
        starts = None
        if boundaries.needed:
            begins = [index * self.seq_len for index in indices]
            found = [document_starts(self._dataset, begin, self.seq_len) for begin in begins]
            starts = np.stack(found)
        mask = None
        if self._mask is not None:
            begins = [index * self.seq_len + 1 for index in indices]
            mask = np.stack([self._mask[begin : begin + self.seq_len] for begin in begins])
        return boundaries.micro_batch(
            np.stack([self[index] for index in indices]), tuple(indices), starts, mask
        )

    def __iter__(self) -> Iterator[IdArray]:
        return (self[index] for index in range(len(self)))
