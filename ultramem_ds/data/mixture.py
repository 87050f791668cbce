"""The global sample order: which tokens sample i of a run is, for any i, at once.

Each subset is one stream of tokens, cut into sequences of S + 1 tokens that overlap by one (input
and shifted target); the last partial one is left out. Two questions are answered by arithmetic,
so that opening, jumping to any sample and 10^9 documents cost nothing:

1. Which subset does sample i draw from, and its how-manieth draw is it? The order repeats blocks
   of 65,536 samples with fixed quotas per subset (weights rounded to 1/65,536, at least one).
   Within a block the k-th of a subset's q draws lies at a random place in [k/q, (k+1)/q) of the
   block, so that every prefix keeps the proportions within a few samples.
2. Which sequence is the k-th draw of a subset? Epoch k // n, and in it a seeded permutation of
   the n sequences: every sequence exactly once per epoch.

Everything is a function of (dataset, weights, S, seed): the state of a run is the number of
consumed samples, whatever the number of ranks and workers.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ultramem_ds.data.indexed import IndexedDataset, open_mask
from ultramem_ds.data.manifest import Manifest, SubsetInfo, load_manifest, prefix_of
from ultramem_ds.data.micro_batch import document_starts
from ultramem_ds.data.permutation import Permutation, stable_hash
from ultramem_ds.data.subsets import REDPAJAMA_WEIGHTS
from ultramem_ds.data.units import Split

logger = logging.getLogger(__name__)

BLOCK = 1 << 16  # samples per block of the mixture; weights are multiples of its inverse

IdArray = npt.NDArray[np.int64]


def num_sequences(num_tokens: int, seq_len: int) -> int:
    """Sequences of ``seq_len`` + 1 tokens, overlapping by one, in a stream of ``num_tokens``."""
    return max(0, (num_tokens - 1) // seq_len)


def default_weights(manifest: Manifest, split: Split = "train") -> dict[str, float]:
    """RedPajama's weights if every subset is one of its known ones, else proportional to tokens."""
    infos = manifest.of_split(split)
    if set(infos) <= set(REDPAJAMA_WEIGHTS):
        return {name: REDPAJAMA_WEIGHTS[name] for name in infos}
    return {name: float(info.tokens) for name, info in infos.items()}


def quotas_of(weights: Mapping[str, float], block: int) -> dict[str, int]:
    """Samples per block for each (positive) weight, ``block`` in total.

    Largest remainders, after everything that would get less than one sample was given one.
    """
    assert 0 < len(weights) <= block
    quotas: dict[str, int] = {}
    while True:
        others = {name: weight for name, weight in weights.items() if name not in quotas}
        rest, total = block - len(quotas), sum(others.values())
        exact = {name: rest * weight / total for name, weight in others.items()}
        tiny = [name for name, share in exact.items() if share < 1]
        if not tiny:
            break
        quotas |= dict.fromkeys(tiny, 1)
    quotas |= {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (quotas[name] - exact[name], name))
    for name in by_remainder[: block - sum(quotas.values())]:
        quotas[name] += 1
    return quotas


@dataclass(frozen=True)
class Location:
    """Where a sample comes from."""

    subset: int  # index into Mixture.subsets
    sequence: int  # of the subset's stream; tokens [sequence * S, sequence * S + S]
    epoch: int  # passes over the subset before this one


class Mixture:
    """Deterministic global order of training (or validation) samples of a prepared directory.

    Args:
        data_dir: a prepared directory.
        split: ``train`` or ``validation``.
        seq_len: S, tokens of a model input; a sample has S + 1.
        weights: per subset, any scale; subsets left out or with weight 0 are not used; empty means
            :func:`default_weights`. Default weights leave out subsets shorter than one sequence.
        seed: of the order.

    Raises:
        ValueError: if the directory is not prepared, a weight names an unknown subset, a weighted
            subset is shorter than one sequence, or nothing is left.
    """

    def __init__(
        self,
        data_dir: str | Path,
        split: Split,
        *,
        seq_len: int,
        weights: Mapping[str, float],
        seed: int,
    ) -> None:
        manifest = load_manifest(data_dir)
        infos = manifest.of_split(split)
        usable = _usable(infos, seq_len, weights or default_weights(manifest, split), bool(weights))
        quotas = quotas_of(usable, BLOCK)
        self.seq_len = seq_len
        self.seed = seed
        self.vocab_size = manifest.tokenizer.vocab_size
        self.subsets: tuple[str, ...] = tuple(sorted(quotas))
        self.weights = {name: quotas[name] / BLOCK for name in self.subsets}
        self._quotas = np.array([quotas[name] for name in self.subsets], dtype=np.int64)
        self._datasets = [
            IndexedDataset(prefix_of(Path(data_dir), (split, name)), random_access=True)
            for name in self.subsets
        ]
        self._masks = [
            open_mask(prefix_of(Path(data_dir), infos[name].group)) if infos[name].masked else None
            for name in self.subsets
        ]
        self.num_sequences = {
            name: num_sequences(dataset.num_tokens, seq_len)
            for name, dataset in zip(self.subsets, self._datasets)
        }
        identity = {
            "seq_len": seq_len,
            "seed": seed,
            "tokenizer": manifest.tokenizer.hash,
            "subsets": [
                [name, infos[name].tokens, infos[name].sha256, quotas[name]]
                + [infos[name].answer_tokens] * infos[name].masked
                for name in self.subsets
            ],
        }
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def locate(self, index: int) -> Location:
        """Where global sample ``index`` comes from, O(1) but for one table per block."""
        block, place = divmod(index, BLOCK)
        subsets, ordinals = _block_order(tuple(self._quotas.tolist()), self.seed, block)
        subset = int(subsets[place])
        draw = block * int(self._quotas[subset]) + int(ordinals[place])
        name = self.subsets[subset]
        epoch, within = divmod(draw, self.num_sequences[name])
        order = _epoch_order(self.num_sequences[name], self.seed, name, epoch)
        return Location(subset, order(within), epoch)

    def sample(self, index: int) -> IdArray:
        """Token ids (S + 1,) int64 of global sample ``index`` >= 0, which may exceed an epoch.

        Raises:
            ValueError: if an id does not belong to the directory's tokenizer.
        """
        location = self.locate(index)
        begin = location.sequence * self.seq_len
        ids = self._datasets[location.subset].tokens(begin, begin + self.seq_len + 1)
        ids_S1 = ids.astype(np.int64)
        if ids_S1.max() >= self.vocab_size or ids_S1.min() < 0:
            raise ValueError(
                f"subset {self.subsets[location.subset]} has ids outside the tokenizer's "
                f"{self.vocab_size} entries; delete its .bin and repeat `prepare`"
            )
        return ids_S1

    def document_starts(self, index: int) -> IdArray:
        """Where the document of each input position starts, (S,) int64, in positions of the sample.

        A document that began before the sample starts at 0 for it.
        """
        location = self.locate(index)
        begin = location.sequence * self.seq_len
        return document_starts(self._datasets[location.subset], begin, self.seq_len)

    @property
    def masked(self) -> bool:
        """Whether some subset says which targets count."""
        return any(mask is not None for mask in self._masks)

    def loss_mask(self, index: int) -> npt.NDArray[np.uint8]:
        """(S,) 1 for the targets of sample ``index`` that count, all of them in plain text."""
        location = self.locate(index)
        begin = location.sequence * self.seq_len + 1
        mask = self._masks[location.subset]
        if mask is None:
            return np.ones(self.seq_len, np.uint8)
        return np.array(mask[begin : begin + self.seq_len])

    def subset_of(self, index: int) -> str:
        """Name of the subset that global sample ``index`` is drawn from."""
        return self.subsets[self.locate(index).subset]

    def proportions(self, begin: int, end: int) -> dict[str, float]:
        """Share of each subset among global samples [begin, end)."""
        counts = np.zeros(len(self.subsets), dtype=np.int64)
        quotas = tuple(self._quotas.tolist())
        first, last = begin // BLOCK, max(begin, end - 1) // BLOCK
        counts += max(0, last - first - 1) * self._quotas
        for block in {first, last}:
            low = max(begin - block * BLOCK, 0)
            high = min(end - block * BLOCK, BLOCK)
            subsets, _ = _block_order(quotas, self.seed, block)
            counts += np.bincount(subsets[low:high], minlength=len(counts))
        total = max(1, end - begin)
        return {name: int(count) / total for name, count in zip(self.subsets, counts)}


def _usable(
    infos: Mapping[str, SubsetInfo], seq_len: int, weights: Mapping[str, float], explicit: bool
) -> dict[str, float]:
    usable = {}
    for name, weight in weights.items():
        if name not in infos:
            raise ValueError(
                f"data.weights.{name}: the data has no such subset, only {', '.join(infos)}"
            )
        if weight < 0:
            raise ValueError(f"data.weights.{name}={weight} must not be negative")
        if weight == 0:
            continue
        if num_sequences(infos[name].tokens, seq_len):
            usable[name] = float(weight)
            continue
        message = (
            f"subset {name} has {infos[name].tokens} tokens, not one sequence of {seq_len} + 1"
        )
        if explicit:
            raise ValueError(f"data.weights.{name}={weight}: {message}")
        logger.warning("%s; it is left out of the mixture", message)
    if not any(weights.values()):
        raise ValueError("every subset has data.weights 0; give one of them a weight")
    if not usable:
        raise ValueError(
            f"no subset with a positive weight has a sequence of {seq_len} + 1 tokens; "
            "prepare more text or choose a smaller model.seq_len"
        )
    return usable


@lru_cache(maxsize=4)
def _block_order(
    quotas: tuple[int, ...], seed: int, block: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(subset, draw of that subset within the block) of each place of a block."""
    # Raw words of a bit generator: numpy promises them to stay the same, unlike its distributions.
    words = np.random.PCG64(stable_hash("block", seed, block)).random_raw(sum(quotas))
    jitter = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    subsets = np.repeat(np.arange(len(quotas)), quotas)
    ordinals = np.concatenate([np.arange(quota) for quota in quotas])
    places = (ordinals + jitter) / np.repeat(np.array(quotas, dtype=np.float64), quotas)
    order = np.argsort(places, kind="stable")
    return subsets[order], ordinals[order]


@lru_cache(maxsize=64)
def _epoch_order(size: int, seed: int, subset: str, epoch: int) -> Permutation:
    return Permutation(size, seed, subset, epoch)
