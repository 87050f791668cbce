"""The native CPU kernel: ``csrc/`` behind :class:`ultramem_ds.kernels.base.Kernel`.

Lookup forward: one pass over the entries, rows prefetched ahead, no sorting, no intermediate.
Backward: entries sorted by row once, then one pass in which each touched row's gradient is
accumulated by one thread (no atomics, reproducible for any number of threads) while its dot
products give the gradients of the scores.

What surrounds the lookup, and the products and attention of decoding, are fp32 only: for other
dtypes they are torch's, as in :class:`ultramem_ds.kernels.plain.PlainKernel`.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ultramem_ds.config.memory import Candidates
from ultramem_ds.kernels.base import Search
from ultramem_ds.kernels.cpu_autograd import causal_conv, conv_forward, select
from ultramem_ds.kernels.native import address, dtype_code
from ultramem_ds.kernels.plain import PlainKernel
from ultramem_ds.kernels.row_adam import AdamStep

# Letters: see kernels/base.py. Q panels of P outputs.

PANEL = 32  # P, outputs of a panel, as in csrc/packed.cpp


def _wide() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def _all_fp32(*tensors: Tensor) -> bool:
    return all(tensor.dtype == torch.float32 for tensor in tensors)


class NativeKernel(PlainKernel):
    """The C++ extension.

    Args:
        library: see ``kernels.native``.
    """

    name = "cpu"

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def _pool(
        self,
        values_RV: Tensor,
        rows_M: Tensor,
        offsets: Tensor | None,
        projectors: Tensor | None,
        scores_Mh: Tensor,
        num_groups: int,
        num_projectors: int,
    ) -> Tensor:
        num_rows, width = values_RV.shape
        num_entries = rows_M.numel()
        pooled = values_RV.new_empty(num_groups, num_projectors, width)
        bad = self.library.ultramem_pool(
            dtype_code(values_RV),
            address(values_RV),
            num_rows,
            width,
            address(rows_M),
            address(offsets),
            address(projectors),
            address(scores_Mh),
            scores_Mh.shape[-1],
            num_groups,
            num_entries // num_groups if num_groups else 0,
            num_projectors,
            num_entries,
            address(pooled),
        )
        _raise_if_bad(bad, num_entries, num_rows)
        return pooled

    def lookup(
        self,
        values_RV: Tensor,
        rows_TK: Tensor,
        projectors_TK: Tensor,
        scores_TKh: Tensor,
        num_projectors: int,
    ) -> Tensor:
        """See :class:`ultramem_ds.kernels.base.Kernel`."""
        return self._pool(
            values_RV, rows_TK, None, projectors_TK, scores_TKh, rows_TK.shape[0], num_projectors
        )

    def bags(
        self, values_RV: Tensor, rows_M: Tensor, offsets_B1: Tensor, scores_Mh: Tensor
    ) -> Tensor:
        """See :class:`ultramem_ds.kernels.base.Kernel`."""
        num_bags = offsets_B1.numel() - 1
        return self._pool(values_RV, rows_M, offsets_B1, None, scores_Mh, num_bags, 1).squeeze(1)

    def entry_dots(
        self, grad_BV: Tensor, values_RV: Tensor, rows_M: Tensor, bags_M: Tensor, num_cores: int
    ) -> Tensor:
        """See :class:`ultramem_ds.kernels.base.Kernel`."""
        dtype = torch.promote_types(values_RV.dtype, torch.float32)
        dots_Mh = values_RV.new_empty(rows_M.numel(), num_cores, dtype=dtype)
        bad = self.library.ultramem_entry_dots(
            dtype_code(values_RV),
            address(values_RV),
            *values_RV.shape,
            address(rows_M),
            address(bags_M),
            num_cores,
            rows_M.numel(),
            address(grad_BV),
            grad_BV.shape[0],
            address(dots_Mh),
        )
        _raise_if_bad(bad, rows_M.numel(), values_RV.shape[0])
        return dots_Mh

    def backward(
        self,
        grad_BV: Tensor,
        values_RV: Tensor,
        rows_M: Tensor,
        bags_M: Tensor,
        scores_Mh: Tensor,
        grad_values_RV: Tensor,
    ) -> Tensor:
        """See :class:`ultramem_ds.kernels.base.Kernel`."""
        sorted_M, order_M = torch.sort(rows_M, stable=True)
        grad_scores_Mh = torch.empty_like(scores_Mh)
        bad = self.library.ultramem_backward(
            dtype_code(values_RV),
            address(values_RV),
            *values_RV.shape,
            address(sorted_M),
            address(order_M),
            address(bags_M),
            address(scores_Mh),
            scores_Mh.shape[1],
            sorted_M.numel(),
            address(grad_BV),
            grad_BV.shape[0],
            address(grad_values_RV),
            address(grad_scores_Mh),
        )
        _raise_if_bad(bad, sorted_M.numel(), values_RV.shape[0])
        return grad_scores_Mh

    def row_adam_(
        self,
        rows_U: Tensor,
        grad_UV: Tensor,
        values_RV: Tensor,
        exp_avg_RV: Tensor,
        exp_avg_sq_RV: Tensor,
        step: AdamStep,
    ) -> None:
        """See :class:`ultramem_ds.kernels.base.Kernel`."""
        self.library.ultramem_row_adam(
            dtype_code(values_RV),
            address(rows_U),
            *grad_UV.shape,
            address(grad_UV),
            address(values_RV),
            address(exp_avg_RV),
            address(exp_avg_sq_RV),
            step.grad_scale,
            step.step_size,
            step.root_correction,
            step.decay,
            step.beta1,
            step.beta2,
            step.eps,
        )

    def causal_conv(
        self,
        x_BSD: Tensor,
        weight_kD: Tensor,
        doc_boundaries_BS: Tensor | None,
        state_BCD: Tensor | None,
    ) -> Tensor:
        """See :class:`ultramem_ds.kernels.base.Kernel`."""
        training = torch.is_grad_enabled()
        if not _all_fp32(x_BSD, weight_kD) or (training and state_BCD is not None):
            return super().causal_conv(x_BSD, weight_kD, doc_boundaries_BS, state_BCD)
        dense = [None if x is None else x.contiguous() for x in (doc_boundaries_BS, state_BCD)]
        x_BSD, weight_kD = x_BSD.contiguous(), weight_kD.contiguous()
        if not training:
            return conv_forward(self.library, x_BSD, weight_kD, *dense)
        return causal_conv(self.library, x_BSD, weight_kD, dense[0])

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
        """See :class:`ultramem_ds.kernels.base.Kernel`.

        Of equal scores the key, or pair of candidates, of the smallest number comes first.
        """
        if candidates != "one-sided" or not _all_fp32(queries_TGd, keys_2Hnrd):
            return super().select(
                search,
                queries_TGd,
                groups_2Hr,
                keys_2Hnrd,
                core_hHrr,
                top_m,
                candidates,
                compile_pairs,
            )
        queries_TGd, keys_2Hnrd = queries_TGd.contiguous(), keys_2Hnrd.contiguous()
        core_hHrr = None if core_hHrr is None else core_hHrr.contiguous()
        return select(self.library, search, queries_TGd, groups_2Hr, keys_2Hnrd, core_hHrr, top_m)

    def shuffle(self, slots: Tensor, tables: Tensor) -> Tensor:
        """See :class:`ultramem_ds.kernels.base.Kernel`."""
        slots = slots.contiguous()
        permuted = torch.empty_like(slots)
        self.library.ultramem_shuffle(
            address(slots), slots.numel(), address(tables), *tables.shape, address(permuted)
        )
        return permuted

    def split(self, slots: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        """See :class:`ultramem_ds.kernels.base.Kernel`."""
        slots = slots.contiguous()
        rows, projectors = torch.empty_like(slots), torch.empty_like(slots)
        self.library.ultramem_split(
            address(slots), slots.numel(), num_rows, address(rows), address(projectors)
        )
        return rows, projectors

    def packs(self, weight: Tensor) -> bool:
        """fp32 with AVX-512: torch's products of 2 to 64 rows do not reach the memory's bandwidth.

        The packed product is blocked for 32 registers of 64 bytes. With AVX2 it is 1.5 times (one
        row) to 28 times (256 rows) slower than torch's.
        """
        return weight.dtype == torch.float32 and _wide()

    def packed_shape(
        self, num_outputs: int, num_inputs: int, *, dtype: torch.dtype
    ) -> tuple[int, ...]:
        """``(Q, K, P)`` of fp32 weights; the last panel is filled up with zeros.

        Without AVX-512 only where torch's grouped product wants other strides (16 bytes).
        """
        aligned = num_outputs % 4 == 0 and num_inputs % 4 == 0
        if dtype != torch.float32 or (aligned and not _wide()):
            return super().packed_shape(num_outputs, num_inputs, dtype=dtype)
        return -(-num_outputs // PANEL), num_inputs, PANEL

    def pack_into(self, packed: Tensor, weight_NK: Tensor) -> None:
        """See :class:`ultramem_ds.kernels.base.Kernel`."""
        if packed.dim() == 2:  # not in panels
            return super().pack_into(packed, weight_NK)
        assert packed.shape == self.packed_shape(*weight_NK.shape, dtype=packed.dtype)
        weight_NK = weight_NK.contiguous()
        self.library.ultramem_pack(address(weight_NK), *weight_NK.shape, address(packed))

    def grouped_linear(
        self, x_MK: Tensor, packed_X: Tensor, ends_X: Tensor, num_outputs: int
    ) -> Tensor:
        """See :class:`ultramem_ds.kernels.base.Kernel`; a view where N fills no whole panels."""
        if packed_X.dim() == 3:  # not in panels
            return super().grouped_linear(x_MK, packed_X, ends_X, num_outputs)
        num_groups, num_panels, num_inputs, _ = packed_X.shape
        x_MK = x_MK.contiguous()
        y = x_MK.new_empty(x_MK.shape[0], num_panels * PANEL)
        self.library.ultramem_grouped_linear(
            address(x_MK),
            address(packed_X),
            address(ends_X),
            num_groups,
            num_panels,
            num_inputs,
            address(y),
        )
        return y[:, :num_outputs]

    def attend(
        self,
        q_BASK: Tensor,
        keys_BACK: Tensor,
        values_BACK: Tensor,
        mask_BSC: Tensor | None,
        dropout: float,
    ) -> Tensor:
        """Natively for one query of a decode step; training, prefill and masks are torch's."""
        B, num_heads, num_positions, width = keys_BACK.shape
        decoding = q_BASK.shape[2] == 1 and mask_BSC is None and not torch.is_grad_enabled()
        dense = keys_BACK.stride() == values_BACK.stride() and keys_BACK.stride(-1) == 1
        if not (decoding and dense and width % 16 == 0 and _all_fp32(q_BASK, keys_BACK)):
            return super().attend(q_BASK, keys_BACK, values_BACK, mask_BSC, dropout)
        q_BASK = q_BASK.contiguous()
        out_BASK = torch.empty_like(q_BASK)
        self.library.ultramem_attend(
            address(q_BASK),
            keys_BACK.data_ptr(),
            values_BACK.data_ptr(),
            *keys_BACK.stride()[:3],
            B,
            num_heads,
            q_BASK.shape[1] // num_heads,
            num_positions,
            width,
            width**-0.5,
            address(out_BASK),
        )
        return out_BASK


def _raise_if_bad(bad: int, num_entries: int, num_rows: int) -> None:
    if bad >= num_entries:
        raise IndexError(f"the offsets of bag {bad - num_entries} are out of range")
    if bad >= 0:
        raise IndexError(
            f"the row id or projector id of entry {bad} is out of range ({num_rows} rows)"
        )
