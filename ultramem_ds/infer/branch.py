"""A cache that branches: many continuations of one prefix, which is computed and held once.

A :class:`Branch` is one forward over a batch of rows; each row continues one row of the branch
before it (its owner), or begins a sequence. Rows are padded on the right: a padded column is seen
by nobody. Example: the shots of a task (1 row), its questions (50 rows, all of owner 0), four
answers to each (200 rows).

Letters: B rows, A attention heads, S columns of this branch, C columns of all branches before it,
K head width, D hidden, R further rows that ask for their owners' past.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ultramem_ds.model.lm import LanguageModel, StepInputs


class _Columns:
    """One block's keys and values of one branch; the past is read from the branch before."""

    def __init__(self, past: _Columns | None, owners_B: Tensor | None) -> None:
        self._past = past
        self._owners_B = owners_B
        self._own: tuple[Tensor, Tensor] | None = None

    def update(self, keys_BASK: Tensor, values_BASK: Tensor) -> tuple[Tensor, Tensor]:
        """Keep this branch's; return those of each row from its sequence's beginning."""
        # Contiguous copies: the values are a view that would keep queries and keys alive too.
        self._own = (keys_BASK.contiguous(), values_BASK.contiguous())
        if self._past is None or self._owners_B is None:
            return self._own
        keys = [part[0] for part in self._past.of(self._owners_B)]
        values = [part[1] for part in self._past.of(self._owners_B)]
        return torch.cat([*keys, self._own[0]], 2), torch.cat([*values, self._own[1]], 2)

    def of(self, rows_R: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values ``(R, A, ., K)`` of these rows, branch by branch."""
        assert self._own is not None
        mine = (_take(self._own[0], rows_R), _take(self._own[1], rows_R))
        if self._past is None or self._owners_B is None:
            return [mine]
        return [*self._past.of(self._owners_B[rows_R]), mine]


def _take(parts_BASK: Tensor, rows_R: Tensor) -> Tensor:
    if parts_BASK.shape[0] == 1:  # a view: the copy is made where it is joined
        return parts_BASK.expand(len(rows_R), -1, -1, -1)
    return parts_BASK.index_select(0, rows_R)


class Branch:
    """The :class:`ultramem_ds.model.lm.DecodeState` of one forward over rows padded on the right.

    Args:
        model: whose blocks and memory layers the state belongs to.
        lengths: tokens of each row, at least one; the forward has as many columns as the longest.
        past: what the rows continue; None where they begin sequences.
        owners: the row of ``past`` that each row continues.
    """

    def __init__(
        self,
        model: LanguageModel,
        lengths: Sequence[int],
        past: Branch | None = None,
        owners: Sequence[int] = (),
    ) -> None:
        self.device = model.embedding.weight.device
        self._lengths_B = torch.tensor(lengths, device=self.device)
        self._past = past
        self._owners_B = torch.tensor(owners, device=self.device) if past is not None else None
        self.kv: list[_Columns] = [
            _Columns(past.kv[i] if past is not None else None, self._owners_B)
            for i in range(len(model.blocks))
        ]
        self.conv: list[Tensor | None] = [None] * len(model.memories)
        self._begins_B = torch.zeros_like(self._lengths_B)
        self._seen_BC: Tensor | None = None  # columns before this branch that hold tokens
        if past is not None and self._owners_B is not None:
            self._begins_B = past._ends_B[self._owners_B]
            self._seen_BC = past._visible_BC[self._owners_B]
            self.conv = [
                None if state is None else state.index_select(0, self._owners_B)
                for state in past.conv
            ]

    def enter(self, num_new: int) -> StepInputs:
        """See ``model.lm.DecodeState``."""
        index_S = torch.arange(num_new, device=self.device)
        positions_BS = self._begins_B.unsqueeze(1) + index_S
        if self._seen_BC is None:
            return StepInputs(index_S.unsqueeze(0), None, None)
        B, C = self._seen_BC.shape
        causal_SS = index_S <= index_S.unsqueeze(1)
        mask_BSS = torch.cat(
            [
                self._seen_BC.unsqueeze(1).expand(B, num_new, C),
                causal_SS.expand(B, num_new, num_new),
            ],
            dim=2,
        )
        return StepInputs(positions_BS, mask_BSS.unsqueeze(1), None)

    def keep_conv(self, index: int, inputs_BSD: Tensor, state_BCD: Tensor | None) -> None:
        """See ``model.lm.DecodeState``: the last inputs of a row's tokens, not of its padding."""
        if state_BCD is None:
            return
        if inputs_BSD.shape[1] == 1:  # no padding; the state before may be gone, moved on in place
            self.conv[index] = state_BCD
            return
        before_BCD = self.conv[index]
        if before_BCD is None:
            before_BCD = torch.zeros_like(state_BCD)
        padded = torch.cat([before_BCD, inputs_BSD], dim=1)
        columns_C = torch.arange(state_BCD.shape[1], device=self.device)
        columns_BC = self._lengths_B.unsqueeze(1) + columns_C
        rows_B1 = torch.arange(len(padded), device=self.device).unsqueeze(1)
        self.conv[index] = padded[rows_B1, columns_BC]

    @property
    def _ends_B(self) -> Tensor:
        return self._begins_B + self._lengths_B

    @property
    def _visible_BC(self) -> Tensor:
        columns_S = torch.arange(int(self._lengths_B.max()), device=self.device)
        own_BS = columns_S < self._lengths_B.unsqueeze(1)
        return own_BS if self._seen_BC is None else torch.cat([self._seen_BC, own_BS], dim=1)
