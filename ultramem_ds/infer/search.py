"""The memory's search for decoding: candidate scores from packed keys.

Letters: T tokens, H heads, n keys per side, d kdim. A leading 2 is the side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ultramem_ds.kernels import resolve


class PackedSearch:
    """``Retrieval.search_product`` on search keys that are packed once per update of the weights.

    The keys' own cache (``model/memory/keys``) makes a new tensor whenever a weight has changed,
    which is how this one notices.

    Args:
        layout: of the queries, see ``model.memory.query.LAYOUTS``.
    """

    def __init__(self, layout: str) -> None:
        self._shared = layout == "s"
        self._both_sides = "s" not in layout
        self._source: Tensor | None = None
        self._packed: Tensor | None = None

    def __call__(self, queries: Tensor, search: Tensor) -> Tensor:
        """``(2, T, H, n)`` from queries by layout and search keys ``(2, H, n, 1 or r, d)``."""
        if self._source is not search:
            self._pack(search)
        assert self._packed is not None
        _, num_heads, num_keys = search.shape[:3]
        num_tokens = queries.shape[0]
        if self._shared:  # (T, 2, d): one group per side
            x = queries.transpose(0, 1)
        elif self._both_sides:  # (T, H, r, d): one group per side and head
            x = queries.flatten(2).transpose(0, 1).expand(2, -1, -1, -1)
        else:  # (T, H, 2, d)
            x = queries.permute(2, 1, 0, 3)
        num_groups, num_outputs = self._groups(search)
        ends_X = torch.arange(1, num_groups + 1, device=search.device) * num_tokens
        scores = resolve("auto", search.device).grouped_linear(
            x.reshape(num_groups * num_tokens, -1), self._packed, ends_X, num_outputs
        )
        if self._shared:
            return scores.reshape(2, num_tokens, num_heads, num_keys)
        return scores.reshape(2, num_heads, num_tokens, num_keys).transpose(1, 2)

    def _groups(self, search: Tensor) -> tuple[int, int]:
        """Number of groups, outputs of each."""
        _, num_heads, num_keys = search.shape[:3]
        return (2, num_heads * num_keys) if self._shared else (2 * num_heads, num_keys)

    def _pack(self, search: Tensor) -> None:
        num_groups, num_outputs = self._groups(search)
        weights = search.reshape(num_groups, num_outputs, -1)
        kernel = resolve("auto", search.device)
        shape = kernel.packed_shape(*weights.shape[1:], dtype=weights.dtype)
        packed = weights.new_empty(num_groups, *shape)
        for slot, weight in zip(packed, weights):
            kernel.pack_into(slot, weight)
        self._packed, self._source = packed, search
