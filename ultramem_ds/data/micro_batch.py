"""What one forward consumes, and where documents begin in it; training and evaluation share it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ultramem_ds.config.schema import DataConfig
from ultramem_ds.data.indexed import IndexedDataset

# Letters: b sequences of a micro-batch, S sequence length.


@dataclass(frozen=True)
class MicroBatch:
    """What one forward of one rank consumes."""

    tokens: Tensor  # (b, S+1) int64; inputs are [:, :-1], targets [:, 1:]
    sample_ids: tuple[int, ...]  # global samples, b of them
    doc_ids: Tensor | None = None  # (b, S) int64, equal where positions share a document
    positions: Tensor | None = None  # (b, S) int64, counted from the document's start
    loss_mask: Tensor | None = None  # (b, S) bool, targets that count; None: all do

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same on ``device``; to a GPU through pinned memory, for which no host waits."""
        pinned = torch.device(device).type == "cuda"
        tensors: dict[str, Any] = {
            name: (value.pin_memory() if pinned else value).to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **tensors)

    @property
    def model_inputs(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The arguments of ``LanguageModel.forward``."""
        return self.tokens, self.doc_ids, self.positions, self.loss_mask

    @property
    def num_targets(self) -> int:
        """Targets that the loss is the mean over."""
        if self.loss_mask is None:
            return self.tokens[:, 1:].numel()
        return int(self.loss_mask.sum())


@dataclass(frozen=True, kw_only=True)
class Boundaries:
    """How much a model is told of documents: ``data.document_mask``, ``data.reset_positions``."""

    document_mask: bool = False
    reset_positions: bool = False

    @classmethod
    def of(cls, data: DataConfig) -> Boundaries:
        """What a configuration asks for."""
        return cls(document_mask=data.document_mask, reset_positions=data.reset_positions)

    @property
    def needed(self) -> bool:
        """Whether document starts have to be looked up."""
        return self.document_mask or self.reset_positions

    def describe(self) -> str:
        """In words, for the console."""
        mask = "inside documents" if self.document_mask else "across documents"
        positions = "restart at documents" if self.reset_positions else "run through"
        return f"attention {mask}, positions {positions}"

    def micro_batch(
        self,
        ids_bS1: npt.NDArray[Any],
        sample_ids: tuple[int, ...],
        starts_bS: npt.NDArray[Any] | None,
        mask_bS: npt.NDArray[np.uint8] | None = None,
    ) -> MicroBatch:
        """Tensors of a forward from arrays of any integer dtype.

        Args:
            ids_bS1: (b, S + 1) token ids.
            sample_ids: b numbers.
            starts_bS: (b, S) document starts, see :func:`document_starts`; None if not ``needed``.
            mask_bS: (b, S) 1 for targets that count; None where all do.
        """
        tokens = torch.from_numpy(ids_bS1.astype(np.int64))
        doc_ids = positions = None
        if starts_bS is not None and self.needed:
            starts = torch.from_numpy(starts_bS.astype(np.int64))
            doc_ids = starts if self.document_mask else None
            positions = torch.arange(starts.shape[1]) - starts if self.reset_positions else None
        mask = None if mask_bS is None else torch.from_numpy(mask_bS).bool()
        return MicroBatch(tokens, sample_ids, doc_ids, positions, mask)


NO_BOUNDARIES = Boundaries()


def document_starts(dataset: IndexedDataset, begin: int, seq_len: int) -> npt.NDArray[np.int64]:
    """Where the document of each input position of a sequence starts.

    Args:
        dataset: documents, concatenated.
        begin: the sequence's first token in it.
        seq_len: S.

    Returns:
        (S,) int64, in positions of the sequence; 0 for a document that began before it.
    """
    starts = dataset.document_starts(begin, begin + seq_len) - begin
    starts_S = np.zeros(seq_len, dtype=np.int64)
    starts_S[starts] = starts
    return np.maximum.accumulate(starts_S)
