"""Micro-batches of one rank, prefetched by worker processes.

Optimizer step s consumes global samples [s*G, (s+1)*G). Micro-batch j of the step holds samples
s*G + j*b ... s*G + j*b + b - 1, whatever the number of ranks P; rank r takes j = r, r + P, r +
2P, ... With skipped ranges these numbers are positions in what remains of the order.
"""

from __future__ import annotations

import atexit
import signal
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from ultramem_ds.data.indexed import id_dtype
from ultramem_ds.data.micro_batch import NO_BOUNDARIES, Boundaries, MicroBatch
from ultramem_ds.data.mixture import Mixture
from ultramem_ds.data.skips import NO_SKIPS, SkipRanges

# Letters: b sequences of a micro-batch, S sequence length, G global batch, P ranks.


class BatchLoader:
    """Iterates the micro-batches of one rank, for ever, from ``start_step`` on.

    Args:
        mixture: the global sample order.
        global_batch_size: G, sequences per optimizer step.
        micro_batch_size: b, sequences per forward.
        rank: this rank, 0..P-1.
        world_size: P.
        start_step: first optimizer step; the state of a run is this number.
        num_workers: prefetching processes; 0 loads in the calling process.
        prefetch: micro-batches each worker keeps ready.
        boundaries: what to say of documents.
        skips: global samples to jump over.

    Raises:
        ValueError: if G is not a multiple of b * P.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        start_step: int = 0,
        num_workers: int = 1,
        prefetch: int = 4,
        boundaries: Boundaries = NO_BOUNDARIES,
        skips: SkipRanges = NO_SKIPS,
    ) -> None:
        if global_batch_size % (micro_batch_size * world_size):
            raise ValueError(
                f"train.global_batch_size={global_batch_size} must be a multiple of "
                f"train.micro_batch_size={micro_batch_size} times {world_size} ranks"
            )
        assert 0 <= rank < world_size, (rank, world_size)
        self.micro_batches_per_step = global_batch_size // (micro_batch_size * world_size)
        self._boundaries = boundaries
        self._loader: DataLoader[_Arrays] = DataLoader(
            _Samples(mixture, with_starts=boundaries.needed),
            sampler=_Order(
                global_batch_size, micro_batch_size, rank, world_size, start_step, skips
            ),
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=num_workers,
            prefetch_factor=prefetch if num_workers else None,
            # Workers only read files and never touch a device, so forking is safe and instant.
            multiprocessing_context="fork" if num_workers else None,
            worker_init_fn=_ignore_requests,
            # Its own, or starting an iteration would draw from the model's (dropout's) generator.
            generator=torch.Generator(),
        )
        self._iterator: Iterator[_Arrays] = iter(())
        self._closed = False
        # Runs before multiprocessing's own end, which asks workers by SIGTERM and waits for ever.
        atexit.register(_close, weakref.ref(self))

    def __iter__(self) -> Iterator[MicroBatch]:
        self._iterator = iter(self._loader)
        while not self._closed:
            arrays = next(self._iterator)
            yield self._boundaries.micro_batch(
                arrays.ids_bS1, arrays.sample_ids, arrays.starts_bS, arrays.mask_bS
            )

    def close(self) -> None:
        """Stop the workers; an iteration in progress ends."""
        self._closed = True
        self._iterator = iter(())  # the workers go with their iterator


def _close(reference: weakref.ref[BatchLoader]) -> None:
    loader = reference()
    if loader is not None:
        loader.close()


def _ignore_requests(worker: int) -> None:
    """Leave requests to stop, which often reach all processes of a job, to the rank.

    It still needs its batches to end properly. A worker ends with its rank, however that ends.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class _Order:
    """Endless tuples of global sample ids, one per micro-batch of this rank."""

    def __init__(
        self,
        size: int,
        micro: int,
        rank: int,
        world_size: int,
        start_step: int,
        skips: SkipRanges,
    ) -> None:
        self._size = size
        self._micro = micro
        self._rank = rank
        self._world_size = world_size
        self._start_step = start_step
        self._skips = skips

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        step = self._start_step
        stride = self._world_size * self._micro
        while True:
            first = step * self._size
            for begin in range(first + self._rank * self._micro, first + self._size, stride):
                yield tuple(map(self._skips.sample_at, range(begin, begin + self._micro)))
            step += 1


@dataclass(frozen=True)
class _Arrays:
    """A micro-batch as workers send it.

    Small integers through a pipe, not tensors: those travel as shared memory, for whose handle the
    training process would have to wait on the worker.
    """

    sample_ids: tuple[int, ...]
    ids_bS1: npt.NDArray[Any]  # uint16 or int32
    starts_bS: npt.NDArray[np.int32] | None
    mask_bS: npt.NDArray[np.uint8] | None


def _unchanged(arrays: Any) -> Any:
    return arrays


class _Samples(Dataset[_Arrays]):
    """Tuples of sample ids -> arrays."""

    def __init__(self, mixture: Mixture, *, with_starts: bool) -> None:
        self._mixture = mixture
        self._with_starts = with_starts

    def __getitem__(self, sample_ids: Sequence[int]) -> _Arrays:
        ids_bS1 = np.stack([self._mixture.sample(index) for index in sample_ids])
        starts_bS = None
        if self._with_starts:
            starts = [self._mixture.document_starts(index) for index in sample_ids]
            starts_bS = np.stack(starts).astype(np.int32)
        mask_bS = None
        if self._mixture.masked:
            mask_bS = np.stack([self._mixture.loss_mask(index) for index in sample_ids])
        dtype = id_dtype(self._mixture.vocab_size)
        return _Arrays(tuple(sample_ids), ids_bS1.astype(dtype), starts_bS, mask_bS)
