"""Every operator around the lookup in torch operations, on any device: the oracle of the others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ultramem_ds.config.memory import Candidates
from ultramem_ds.kernels.base import Kernel, Search
from ultramem_ds.kernels.dots import exact_scores
from ultramem_ds.kernels.finding import FoundRows, RowFinder
from ultramem_ds.kernels.pairs import best_pairs, compiled_best_pairs, top_candidates
from ultramem_ds.kernels.row_adam import AdamStep

# Letters: see kernels/base.py.


class PlainKernel(Kernel):
    """A :class:`ultramem_ds.kernels.base.Kernel` but for the lookups."""

    def add_rows_(self, target_RV: Tensor, rows_M: Tensor, values_MV: Tensor) -> None:
        """On a GPU ``index_put_``, which sorts: ``index_add_`` adds in any order there."""
        if target_RV.device.type == "cpu":
            target_RV.index_add_(0, rows_M, values_MV)
        else:
            target_RV.index_put_((rows_M,), values_MV, accumulate=True)

    def row_adam_(
        self,
        rows_U: Tensor,
        grad_UV: Tensor,
        values_RV: Tensor,
        exp_avg_RV: Tensor,
        exp_avg_sq_RV: Tensor,
        step: AdamStep,
    ) -> None:
        """See :class:`AdamStep` for the formula."""
        grad_UV = grad_UV * step.grad_scale
        avg_UV = exp_avg_RV.index_select(0, rows_U).lerp_(grad_UV, 1.0 - step.beta1)
        avg_sq_UV = exp_avg_sq_RV.index_select(0, rows_U).mul_(step.beta2)
        avg_sq_UV.addcmul_(grad_UV, grad_UV, value=1.0 - step.beta2)
        value_UV = values_RV.index_select(0, rows_U).to(grad_UV.dtype).mul_(step.decay)
        denominator_UV = avg_sq_UV.sqrt().div_(step.root_correction).add_(step.eps)
        value_UV.addcdiv_(avg_UV, denominator_UV, value=-step.step_size)
        exp_avg_RV.index_copy_(0, rows_U, avg_UV)
        exp_avg_sq_RV.index_copy_(0, rows_U, avg_sq_UV)
        values_RV.index_copy_(0, rows_U, value_UV.to(values_RV.dtype))

    def causal_conv(
        self,
        x_BSD: Tensor,
        weight_kD: Tensor,
        doc_boundaries_BS: Tensor | None,
        state_BCD: Tensor | None,
    ) -> Tensor:
        """See :class:`ultramem_ds.kernels.base.Kernel`."""
        batch, seq_len, width = x_BSD.shape
        reach = len(weight_kD) - 1
        if state_BCD is None:
            state_BCD = x_BSD.new_zeros(batch, reach, width)
        padded = torch.cat([state_BCD, x_BSD], dim=1)
        out_BSD = x_BSD * weight_kD[reach]
        if doc_boundaries_BS is None:
            for tap in range(reach):
                out_BSD = out_BSD + padded[:, tap : tap + seq_len] * weight_kD[tap]
            return out_BSD
        document_BS = doc_boundaries_BS.cumsum(1)
        document = torch.cat([document_BS.new_zeros(batch, reach), document_BS], dim=1)
        for tap in range(reach):
            same_BS = document[:, tap : tap + seq_len] == document_BS
            past_BSD = padded[:, tap : tap + seq_len] * same_BS[..., None]
            out_BSD = out_BSD + past_BSD * weight_kD[tap]
        return out_BSD

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
        """See :class:`ultramem_ds.kernels.base.Kernel`; candidates in the compute dtype."""
        with torch.no_grad():
            scores_2THn = search(slice(None))
            index_2THc = top_candidates(scores_2THn, top_m, candidates)
        scores_2THcr = exact_scores(self, queries_TGd, groups_2Hr, keys_2Hnrd, index_2THc)
        pairs = compiled_best_pairs() if compile_pairs else best_pairs
        picks_2THm, scores_THmh = pairs(core_hHrr, scores_2THcr, top_m)
        rows_THm, cols_THm = index_2THc.gather(-1, picks_2THm).unbind(0)
        return rows_THm * keys_2Hnrd.shape[2] + cols_THm, scores_THmh

    def shuffle(self, slots: Tensor, tables: Tensor) -> Tensor:
        """See :class:`ultramem_ds.kernels.base.Kernel`."""
        n = tables.shape[1]
        left, right = slots // n, slots % n
        for table in tables:
            left, right = right, (left + table[right]) % n
        return left * n + right

    def split(self, slots: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        """See :class:`ultramem_ds.kernels.base.Kernel`."""
        return slots % num_rows, slots // num_rows

    def finds_rows(self, weight: Tensor) -> bool:
        """Never: torch does it one operator at a time, as the model's own modules do."""
        return False

    def find_rows(
        self, finder: RowFinder, x_TD: Tensor, state_TCD: Tensor | None, begins_T: Tensor | None
    ) -> FoundRows:
        """See :class:`ultramem_ds.kernels.base.Kernel`."""
        if finder.conv_kD is not None:
            assert state_TCD is not None
            inputs_T1D = x_TD[:, None]
            begins_T1 = None if begins_T is None else begins_T[:, None]
            x_TD = self.causal_conv(inputs_T1D, finder.conv_kD, begins_T1, state_TCD)[:, 0]
            state_TCD.copy_(torch.cat([state_TCD[:, 1:], inputs_T1D], dim=1))
        width = finder.keys_2Hnrd.shape[4]
        queries_TGd = F.linear(x_TD, finder.proj_OD).view(-1, finder.num_queries, width)
        if finder.norm == "layernorm":
            queries_TGd = F.layer_norm(queries_TGd, (width,), finder.norm_d, None, finder.eps)
        elif finder.norm == "rmsnorm":
            queries_TGd = F.rms_norm(queries_TGd, (width,), finder.norm_d, finder.eps)
        groups_2Hs = finder.groups_2Hr[:, :, : finder.search_2Hnsd.shape[3]]

        def search(tokens: slice) -> Tensor:
            met_T2Hsd = queries_TGd[tokens, groups_2Hs]
            return torch.einsum("txhsd,xhnsd->xthn", met_T2Hsd, finder.search_2Hnsd)

        slots_THm, scores_THmh = self.select(
            search,
            queries_TGd,
            finder.groups_2Hr,
            finder.keys_2Hnrd,
            finder.core_hHrr,
            finder.top_m,
        )
        if finder.softmax:
            scores_THmh = scores_THmh.softmax(dim=-2)
        slots_TK = permuted_TK = slots_THm.flatten(1)
        if finder.rounds is not None:
            permuted_TK = self.shuffle(slots_TK, finder.rounds)
        elif finder.permutation is not None:
            permuted_TK = finder.permutation[slots_TK]
        return FoundRows(
            slots_TK,
            permuted_TK,
            *self.split(permuted_TK, finder.num_rows),
            scores_THmh.flatten(1, 2),
        )

    def packs(self, weight: Tensor) -> bool:
        """Never: torch multiplies with weights as they are."""
        return False

    def packed_shape(
        self, num_outputs: int, num_inputs: int, *, dtype: torch.dtype
    ) -> tuple[int, ...]:
        """The weight's own."""
        return num_outputs, num_inputs

    def pack_into(self, packed: Tensor, weight_NK: Tensor) -> None:
        """A copy."""
        packed.copy_(weight_NK)

    def grouped_linear(
        self, x_MK: Tensor, packed_X: Tensor, ends_X: Tensor, num_outputs: int
    ) -> Tensor:
        """See :class:`ultramem_ds.kernels.base.Kernel`."""
        return F.grouped_mm(x_MK, packed_X.transpose(1, 2), offs=ends_X.to(torch.int32))

    def attend(
        self,
        q_BASK: Tensor,
        keys_BACK: Tensor,
        values_BACK: Tensor,
        mask_BSC: Tensor | None,
        dropout: float,
    ) -> Tensor:
        """Torch's scaled-dot-product attention."""
        batch, num_heads, num_queries, width = q_BASK.shape
        cached_heads = keys_BACK.shape[1]
        if num_queries == 1 and num_heads != cached_heads:
            # A group's query heads lie along the positions: one product per cached head.
            q_BASK = q_BASK.reshape(batch, cached_heads, -1, width)
        out = F.scaled_dot_product_attention(
            q_BASK,
            keys_BACK,
            values_BACK,
            attn_mask=mask_BSC,
            dropout_p=dropout,
            is_causal=mask_BSC is None and num_queries > 1,
            enable_gqa=q_BASK.shape[1] != cached_heads,
        )
        return out.reshape(batch, num_heads, num_queries, width)
