"""Product keys: normalised over kdim, and folded into one search vector per key.

The candidate score S_row.u = sum_r u_r (q . k_r) is linear in the keys, so the search multiplies
queries with sum_r u_r k_r: a product r times smaller than all row and column scores, of which only
the candidates' are needed exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ultramem_ds.config.schema import MemoryConfig
from ultramem_ds.model.memory.query import LAYOUTS, qk_norm
from ultramem_ds.model.roles import tag

# H heads, n keys per side, r Tucker rank, d kdim. A leading 2 is the side: rows, then columns.


class Fingerprint:
    """Tells whether a tensor has been written through or replaced since.

    Sees in-place operations (the version counter) and new storage (a weak reference, so that
    nothing is kept alive). Writes through ``.data`` are invisible: ``mark_stale`` is for those.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._version = 0 if tensor.is_inference() else tensor._version

    def matches(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is the one seen, unchanged."""
        now = Fingerprint(tensor)
        alive = not self._storage.expired()
        return alive and self._storage == now._storage and self._version == now._version


@dataclass(frozen=True)
class _Derived:
    """What was computed from the weights, and from which."""

    sources: tuple[Fingerprint, ...]
    keys_2Hnrd: Tensor  # normalised, no gradient
    search: Tensor  # folded, no gradient

    def matches(self, tensors: list[Tensor]) -> bool:
        return all(source.matches(tensor) for source, tensor in zip(self.sources, tensors))


class ProductKeys(nn.Module):
    """Row and column keys (2, H, n, r, d) of all heads and ranks.

    Stored with kdim last: the norm runs over contiguous memory and one batched product covers all
    heads. Without gradients (inference, evaluation) keys are normalised and folded once per weight
    update: the cache is dropped by ``mark_stale``, by a load, and whenever a weight's storage or
    version counter has changed.
    """

    def __init__(self, memory: MemoryConfig, eps: float) -> None:
        super().__init__()
        shape = (2, memory.num_heads, memory.num_keys, memory.tucker_rank, memory.kdim)
        self.weight = nn.Parameter(torch.empty(shape))
        tag(self.weight, role="matrix", init="memory_keys")
        self.norm = qk_norm(memory, eps, init="memory_keys_norm")
        self.ranks_share_query = "r" not in LAYOUTS[memory.query]
        self._derived: _Derived | None = None
        self.register_load_state_dict_post_hook(lambda module, _: module.mark_stale())

    def mark_stale(self) -> None:
        """The weights changed: derive everything anew at the next forward."""
        self._derived = None

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles carry: no derived keys, whose fingerprints are addresses."""
        return {**self.__dict__, "_derived": None}

    def forward(self, directions_2Hr: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise and fold.

        Args:
            directions_2Hr: u and v of the candidate search, no gradient.

        Returns:
            Keys (2, H, n, r, d), differentiable where gradients are enabled; and what queries are
            multiplied with in the search, no gradient: (2, H, n, 1, d) where the ranks share a
            query, else (2, H, n, r, d).
        """
        if torch.is_grad_enabled():
            keys_2Hnrd = self.norm(self.weight)
            return keys_2Hnrd, self._fold(keys_2Hnrd.detach(), directions_2Hr)
        sources = [self.weight, *self.norm.parameters(), directions_2Hr]
        if self._derived is None or not self._derived.matches(sources):
            keys_2Hnrd = self.norm(self.weight)
            search = self._fold(keys_2Hnrd, directions_2Hr)
            fingerprints = tuple(Fingerprint(source) for source in sources)
            self._derived = _Derived(fingerprints, keys_2Hnrd, search)
        return self._derived.keys_2Hnrd, self._derived.search

    @torch.no_grad()
    def _fold(self, keys_2Hnrd: Tensor, directions_2Hr: Tensor) -> Tensor:
        wide = torch.promote_types(keys_2Hnrd.dtype, directions_2Hr.dtype)
        weighted = keys_2Hnrd.to(wide) * directions_2Hr[:, :, None, :, None].to(wide)
        folded = weighted.sum(3, keepdim=True) if self.ranks_share_query else weighted
        return folded.to(keys_2Hnrd.dtype)
