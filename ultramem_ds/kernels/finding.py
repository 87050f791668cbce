"""What a memory layer's retrieval of one decode step is computed from, and what it gives.

From a token's hidden state to the rows that it looks up: query convolution, projection and norm,
candidates of each side, their exact scores, the best pairs, softmax, slot permutation, rows and
projectors. ``Kernel.find_rows`` does it in as few launches as it can.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from torch import Tensor

# T tokens, one of each sequence, K = H * m rows per token, D hidden, G queries of a token, d kdim,
# k taps, H heads, n keys per side, r Tucker rank, s directions searched (1 or r), h cores. A
# leading 2 is the side: rows, then columns.

Norm: TypeAlias = Literal["none", "layernorm", "rmsnorm"]


@dataclass(frozen=True, eq=False, kw_only=True)
class RowFinder:
    """Weights and settings, all without gradients, of one dtype unless said otherwise.

    Attributes:
        conv_kD: taps of the causal convolution, the token's own last; None: no convolution.
        proj_OD: query projection, ``O = G * d``.
        norm: of the queries, over d; the keys are normalised already.
        norm_d: its weight; None without a norm.
        eps: of the norm.
        groups_2Hr: int64, which of a token's queries meets the keys of a side, head and rank.
        keys_2Hnrd: keys.
        search_2Hnsd: what ranks candidates.
        core_hHrr: Tucker cores, fp32; None: a pair's score is the sum of its row's and column's.
        top_m: m.
        softmax: over a head's selected scores.
        rounds: round functions of a Feistel network, int64 ``(rounds, n)``; None: none.
        permutation: of all slots, int64 ``(n * n,)``, where there are no rounds; None: none.
        num_rows: physical rows.
    """

    conv_kD: Tensor | None
    proj_OD: Tensor
    norm: Norm
    norm_d: Tensor | None
    eps: float
    groups_2Hr: Tensor
    keys_2Hnrd: Tensor
    search_2Hnsd: Tensor
    core_hHrr: Tensor | None
    top_m: int
    softmax: bool
    rounds: Tensor | None
    permutation: Tensor | None
    num_rows: int

    @property
    def num_queries(self) -> int:
        """G."""
        return self.proj_OD.shape[0] // self.keys_2Hnrd.shape[4]


class FoundRows(NamedTuple):
    """What a token looks up, heads head-major, best first within a head."""

    slots_TK: Tensor  # int64, row * n + col
    permuted_TK: Tensor  # int64, after the permutation
    rows_TK: Tensor  # int64, permuted % num_rows
    projectors_TK: Tensor  # int64, permuted // num_rows
    scores_TKh: Tensor  # fp32
