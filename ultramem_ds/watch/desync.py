"""Ranks that should hold the same compare notes, at start and every ``train.desync_every`` steps.

A rank hands in a few 64-bit numbers, one per item: step, configuration, data, code, learning rates,
decisions of the guard, and checksums of parameters that every rank holds whole. One all-gather of
those numbers later every rank knows who differs in what, and all stop together.

Which parameters are replicated depends on ZeRO: stages 1 and 2 keep every one but the experts on
every rank, stage 3 only the small ones (``stage3_param_persistence_threshold``); what is cut into
slices has no copy to compare with. Value tables of which there are several copies
(``memory.shard_group_size``) are compared block by block: the ranks that hold the same block stand
at the same *place* of their sub-group. At the start all of them count, afterwards one in
``ROTATION`` each time, in turns. A checksum is the sum of the bits as integers: exact in any order,
and one flipped bit changes it.

Letters: P ranks, X items.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from ultramem_ds.sharding.comm import Comm

ROTATION = 8  # comparisons until every replicated parameter has had its turn

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class DesyncError(ValueError):
    """Ranks differ in what they should share."""


def digest(value: object) -> int:
    """63 bits that stand for ``repr(value)``."""
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8], "big") >> 1


def code_digest() -> int:
    """Of this package's sources, wherever they are installed, and of the libraries' versions."""
    package = Path(__file__).resolve().parents[1]
    files = sorted(path for path in package.rglob("*") if path.suffix in (".py", ".cpp", ".h"))
    sources = [(str(path.relative_to(package)), path.read_bytes()) for path in files]
    return digest((sources, torch.__version__, metadata.version("deepspeed")))


def checksum(tensor: Tensor) -> int:
    """Sum of the bit patterns as integers, wrapping."""
    return int(tensor.reshape(-1).view(_INTEGER[tensor.element_size()]).sum(dtype=torch.int64))


def find_odd(
    values_PX: Sequence[Sequence[int]], names: Sequence[str], ranks: Sequence[int] | None = None
) -> str:
    """Who differs in what, in words; empty if nobody does.

    ``ranks`` are those that the rows of ``values_PX`` are from, where they are not all.

    >>> find_odd([[1, 5], [1, 6], [1, 5]], ["step", "data"])
    'rank 1 differs from 2 of 3 ranks in data'
    """
    differing: dict[tuple[int, ...], list[str]] = {}
    majority = 0
    for item, name in enumerate(names):
        column = [values[item] for values in values_PX]
        (value, count), *_ = Counter(column).most_common()
        if count == len(column):
            continue
        if 2 * count > len(column):
            odd = tuple(
                rank if ranks is None else ranks[rank]
                for rank, other in enumerate(column)
                if other != value
            )
            majority = count
        else:
            odd = ()
        differing.setdefault(odd, []).append(name)
    parts = []
    for odd, items in differing.items():
        what = ", ".join(items)
        if odd:
            who = f"rank {odd[0]} differs" if len(odd) == 1 else f"ranks {_listed(odd)} differ"
            parts.append(f"{who} from {majority} of {len(values_PX)} ranks in {what}")
        else:
            who = f"the {len(values_PX)} ranks" if ranks is None else f"ranks {_listed(ranks)}"
            parts.append(f"{who} differ in {what}, without a majority")
    return "; ".join(parts)


def compare(
    comm: Comm,
    items: Mapping[str, int],
    device: torch.device,
    block: int = 0,
    place: int = 0,
) -> None:
    """One all-gather of ``items``, the same names on every rank of ``comm``.

    Args:
        comm: the ranks.
        items: what should be the same on all of them.
        device: where the backend takes tensors.
        block: what should be the same on the ranks of this ``place``.
        place: see ``block``.

    Raises:
        DesyncError: on every rank, if they are not the same numbers.
    """
    mine_X = torch.tensor([place, block, *items.values()], dtype=torch.int64, device=device)
    values_PX = comm.all_gather(mine_X, "counts").tolist()
    found = [find_odd([values[2:] for values in values_PX], list(items))]
    for here in sorted({values[0] for values in values_PX}):
        ranks = [rank for rank, values in enumerate(values_PX) if values[0] == here]
        blocks_P1 = [values_PX[rank][1:2] for rank in ranks]
        found.append(find_odd(blocks_P1, ["the same block of value tables"], ranks))
    if any(found):
        raise DesyncError(f"the ranks are out of step: {'; '.join(filter(None, found))}")


class DesyncGuard:
    """The comparisons of one run.

    Args:
        comm: all ranks.
        device: where the backend takes tensors.
        replicated: returns the parameters that every rank holds whole, by name.
        every: ``train.desync_every``.
        blocks: returns this rank's blocks of value tables that other ranks hold too, by name.
        place: the same on the ranks that hold the same blocks.
    """

    def __init__(
        self,
        comm: Comm,
        device: torch.device,
        replicated: Callable[[], Mapping[str, Tensor]],
        every: int,
        blocks: Callable[[], Mapping[str, Tensor]] = dict,
        place: int = 0,
    ) -> None:
        self.comm = comm
        self.device = device
        self.replicated = replicated
        self.every = every
        self.blocks = blocks
        self.place = place
        self._turn = 0

    def due(self, step: int) -> bool:
        """Whether the comparison after ``step`` steps is due."""
        return bool(self.every) and step % self.every == 0

    def compare(self, items: Mapping[str, int], *, everything: bool = False) -> None:
        """Compare ``items``, parameters and blocks of tables; a collective.

        Raises:
            DesyncError: on every rank, naming the odd ones and the first parameters that differ.
        """
        step = 1 if everything else ROTATION
        first = 0 if everything else self._turn % ROTATION
        self._turn += 1
        sums, blocks = (
            {name: checksum(held[name]) for name in list(held)[first::step]}
            for held in (self.replicated(), self.blocks())
        )
        items = {**items, "parameters": digest(tuple(sums.values()))}
        block = digest(tuple(blocks.values()))
        try:
            compare(self.comm, items, self.device, block, self.place)
        except DesyncError as error:
            detail = self._odd_names(sums, blocks)
            raise DesyncError(f"{error}{detail}") from None

    def _odd_names(self, sums: Mapping[str, int], blocks: Mapping[str, int]) -> str:
        """The first parameters that differ, in brackets; a collective."""
        gathered = self.comm.gather_objects((self.place, sums, blocks))
        odd = [n for n in sums if len({sums_of.get(n) for _, sums_of, _ in gathered}) > 1]
        seen: dict[tuple[int, str], set[int]] = {}
        for place, _, blocks_of in gathered:
            for name, value in blocks_of.items():
                seen.setdefault((place, name), set()).add(value)
        odd += sorted({name for (_, name), values in seen.items() if len(values) > 1})
        more = f", ... ({len(odd)} in all)" if len(odd) > 4 else ""
        return f" ({', '.join(odd[:4])}{more})" if odd else ""


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
