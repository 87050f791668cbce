"""What every kernel offers, and the two layouts in which a lookup's entries come.

An *entry* is one looked-up row with its h scores. Entries are summed into *bags*: a bag is one
(token, projector) of the rectangular layout, or one CSR segment of the ragged layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from ultramem_ds.config.memory import Candidates
from ultramem_ds.kernels.finding import FoundRows, RowFinder
from ultramem_ds.kernels.row_adam import AdamStep

# T tokens, K entries per token, M entries in all (T * K when rectangular), E projectors, B bags,
# B1 = B + 1, R rows of the table on this rank, V value width, h cores, U distinct rows touched.
# H heads, n keys per side, r Tucker rank, m top-m, G queries of a token, d kdim; a leading 2 is the
# side: rows, then columns.

# A run of tokens -> their candidate scores (2, tokens, H, n).
Search: TypeAlias = Callable[[slice], Tensor]


class Kernel(Protocol):
    """One implementation of every operator of a memory layer and of decoding.

    ``plain.PlainKernel`` has all of them in torch operations, which are the oracle; others replace
    some, or replace them for some dtypes.

    For the lookups, arguments have been checked by :mod:`ultramem_ds.kernels.ops`: ids are int64
    and contiguous, scores are in the accumulation dtype, ``values_RV`` and ``grad_BV`` are
    contiguous and of one dtype. Results are in the dtype of ``values_RV``, gradients in the
    accumulation dtype. ``causal_conv`` and ``select`` are differentiable.
    """

    name: str

    def lookup(
        self,
        values_RV: Tensor,
        rows_TK: Tensor,
        projectors_TK: Tensor,
        scores_TKh: Tensor,
        num_projectors: int,
    ) -> Tensor:
        """Pool the rectangular layout into ``(T, E, V)``."""
        ...

    def bags(
        self, values_RV: Tensor, rows_M: Tensor, offsets_B1: Tensor, scores_Mh: Tensor
    ) -> Tensor:
        """Pool the ragged layout into ``(B, V)``."""
        ...

    def entry_dots(
        self, grad_BV: Tensor, values_RV: Tensor, rows_M: Tensor, bags_M: Tensor, num_cores: int
    ) -> Tensor:
        """Dot products of every entry's row with its bag's gradient, per core: ``(M, h)``.

        They are the gradients of the scores, which do not depend on the scores.
        """
        ...

    def backward(
        self,
        grad_BV: Tensor,
        values_RV: Tensor,
        rows_M: Tensor,
        bags_M: Tensor,
        scores_Mh: Tensor,
        grad_values_RV: Tensor,
    ) -> Tensor:
        """Add the table's gradient to ``grad_values_RV``; return ``entry_dots``."""
        ...

    def add_rows_(self, target_RV: Tensor, rows_M: Tensor, values_MV: Tensor) -> None:
        """``target[rows[m]] += values[m]``, the same bits each time; both of one dtype."""
        ...

    def row_adam_(
        self,
        rows_U: Tensor,
        grad_UV: Tensor,
        values_RV: Tensor,
        exp_avg_RV: Tensor,
        exp_avg_sq_RV: Tensor,
        step: AdamStep,
    ) -> None:
        """Update rows of the table and of its moments in place (AdamW)."""
        ...

    def causal_conv(
        self,
        x_BSD: Tensor,
        weight_kD: Tensor,
        doc_boundaries_BS: Tensor | None,
        state_BCD: Tensor | None,
    ) -> Tensor:
        """Causal depthwise convolution over the sequence, ``(B, S, D)``.

        Args:
            x_BSD: inputs.
            weight_kD: taps, the token's own last.
            doc_boundaries_BS: True at the first token of a document; taps do not cross it.
            state_BCD: the k - 1 inputs before ``x_BSD``; None: zeros.
        """
        ...

    def select(
        self,
        search: Search,
        queries_TGd: Tensor,
        groups_2Hr: Tensor,
        keys_2Hnrd: Tensor,
        core_hHrr: Tensor | None,
        top_m: int,
        candidates: Candidates = "one-sided",
        compile_pairs: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """A memory layer's two-stage selection (``model.memory.retrieval``).

        Args:
            search: gives the candidate scores of a run of tokens; called without gradients.
            queries_TGd: a token's distinct queries.
            groups_2Hr: int64, which of them meets the keys of a side, head and rank.
            keys_2Hnrd: all keys.
            core_hHrr: Tucker cores, or None: a pair's score is the sum of its row's and column's.
            top_m: m, at most n.
            candidates: which ends of the candidate scores are taken.
            compile_pairs: ``torch.compile`` what torch operations score and rank pairs.

        Returns:
            Slots ``(T, H, m)``, int64, and scores per core ``(T, H, m, h)``, fp32 at least, best
            first, differentiable in queries, keys and cores.
        """
        ...

    def shuffle(self, slots: Tensor, tables: Tensor) -> Tensor:
        """Slots in [0, n * n) through a Feistel network of round functions ``(rounds, n)``."""
        ...

    def split(self, slots: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        """Rows ``slots % num_rows`` and projectors ``slots // num_rows`` of slots >= 0."""
        ...

    def finds_rows(self, weight: Tensor) -> bool:
        """Whether :meth:`find_rows` is the faster way for weights like this one."""
        ...

    def find_rows(
        self, finder: RowFinder, x_TD: Tensor, state_TCD: Tensor | None, begins_T: Tensor | None
    ) -> FoundRows:
        """A decode step's way from hidden states to the rows that a memory layer looks up.

        One-sided candidates, one token of each sequence, no gradients.

        Args:
            finder: weights and settings.
            x_TD: hidden states.
            state_TCD: the convolution's inputs before them, ``C = k - 1``, dense in D; moved on by
                these tokens, in place. None without a convolution.
            begins_T: True where a token is the first of its document; None: nowhere.
        """
        ...

    def packs(self, weight: Tensor) -> bool:
        """Whether weights like this one gain by being laid out anew for few rows of inputs."""
        ...

    def packed_shape(
        self, num_outputs: int, num_inputs: int, *, dtype: torch.dtype
    ) -> tuple[int, ...]:
        """Shape of what :meth:`pack_into` makes of an ``(N, K)`` weight."""
        ...

    def pack_into(self, packed: Tensor, weight_NK: Tensor) -> None:
        """Lay a weight out for :meth:`grouped_linear`; ``packed`` is contiguous."""
        ...

    def grouped_linear(
        self, x_MK: Tensor, packed_X: Tensor, ends_X: Tensor, num_outputs: int
    ) -> Tensor:
        """Multiply runs of rows with their group's weight, ``y = x W_g^T``: ``(M, N)``.

        Args:
            x_MK: rows, those of group g behind those of group g - 1.
            packed_X: packed weights of all groups; those of groups without rows are not read.
            ends_X: int64, row after the last one of each group; the last is M.
            num_outputs: N.
        """
        ...

    def attend(
        self,
        q_BASK: Tensor,
        keys_BACK: Tensor,
        values_BACK: Tensor,
        mask_BSC: Tensor | None,
        dropout: float,
    ) -> Tensor:
        """Scaled dot-product attention, ``(B, A, S, K)``.

        Without a mask it is causal; one query alone sees every key. Queries may have a multiple of
        the cached heads, of which each then serves a run of query heads (Ainslie et al., 2023).
        """
        ...


class Layout(Protocol):
    """Entries and the bags they are summed into."""

    def pool(self, kernel: Kernel, values_RV: Tensor, scores: Tensor) -> Tensor:
        """Run ``kernel`` forward; ``scores`` and the result have the layout's own shapes."""
        ...

    def entries(self) -> tuple[Tensor, Tensor]:
        """Return ``(rows_M, bags_M)``: the row and the bag of every entry."""
        ...


class Rectangular(NamedTuple):
    """K entries for each of T tokens; bag ``t * E + projector``."""

    rows_TK: Tensor
    projectors_TK: Tensor
    num_projectors: int

    def pool(self, kernel: Kernel, values_RV: Tensor, scores: Tensor) -> Tensor:
        """See :class:`Layout`."""
        return kernel.lookup(
            values_RV, self.rows_TK, self.projectors_TK, scores, self.num_projectors
        )

    def entries(self) -> tuple[Tensor, Tensor]:
        """See :class:`Layout`."""
        return self.rows_TK.flatten(), rectangular_bags(self.projectors_TK, self.num_projectors)


class Ragged(NamedTuple):
    """Entries ``offsets[b] : offsets[b + 1]`` form bag b; a bag may be empty."""

    rows_M: Tensor
    offsets_B1: Tensor

    def pool(self, kernel: Kernel, values_RV: Tensor, scores: Tensor) -> Tensor:
        """See :class:`Layout`."""
        return kernel.bags(values_RV, self.rows_M, self.offsets_B1, scores)

    def entries(self) -> tuple[Tensor, Tensor]:
        """See :class:`Layout`."""
        return self.rows_M, ragged_bags(self.offsets_B1, self.rows_M.numel())


def rectangular_bags(projectors_TK: Tensor, num_projectors: int) -> Tensor:
    """Return the bag ``t * E + projector`` of every entry, int64 ``(M,)``."""
    first_bag_T = torch.arange(projectors_TK.shape[0], device=projectors_TK.device)
    return (projectors_TK + first_bag_T[:, None] * num_projectors).flatten()


def ragged_bags(offsets_B1: Tensor, num_entries: int) -> Tensor:
    """Return the bag of every entry of a CSR layout, int64 ``(M,)``."""
    bags_B = torch.arange(offsets_B1.numel() - 1, device=offsets_B1.device)
    return torch.repeat_interleave(bags_B, offsets_B1.diff(), output_size=num_entries)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums and gradients of a table of ``dtype`` are kept in."""
    return torch.promote_types(dtype, torch.float32)
