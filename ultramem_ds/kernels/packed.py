"""Products of few rows with many weights on a CPU: ``csrc/packed.cpp``.

torch's own linear maps do not reach a CPU's memory bandwidth with 2 to 64 rows (MKL repacks the
weights on every call); these do, and above about 10 rows they reach the rate of a large matrix
product (docs/inference.md has the numbers). fp32 only: other dtypes and devices stay with torch.
"""

from __future__ import annotations

import ctypes
import functools
import logging

import torch
from torch import Tensor

from ultramem_ds.kernels.build import BuildError, build

# M rows, K inner, N outputs, X groups, Q panels of P outputs.

PANEL = 32  # P, outputs of a panel, as in csrc/packed.cpp
_LOGGER = logging.getLogger(__name__)


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(build()))
    except (BuildError, OSError) as error:
        _LOGGER.warning("native packed product unavailable, using torch's: %s", error)
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.ultramem_pack.argtypes = [pointer, number, number, pointer]
    library.ultramem_pack.restype = None
    library.ultramem_grouped_linear.argtypes = [pointer] * 3 + [number] * 3 + [pointer]
    library.ultramem_grouped_linear.restype = None
    library.ultramem_attend.argtypes = [pointer] * 3 + [number] * 8 + [ctypes.c_float] + [pointer]
    library.ultramem_attend.restype = None
    return library


def can_pack(weight: Tensor) -> bool:
    """Whether products with ``weight`` can take this path."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and _library() is not None


def packed_shape(num_outputs: int, num_inputs: int) -> tuple[int, int, int]:
    """Shape ``(Q, K, P)`` of a packed ``(N, K)`` weight; the last panel is filled up with zeros."""
    return -(-num_outputs // PANEL), num_inputs, PANEL


def pack_into(packed_QKP: Tensor, weight_NK: Tensor) -> None:
    """Write the packed form of a weight.

    Args:
        packed_QKP: of :func:`packed_shape`, fp32, contiguous.
        weight_NK: fp32, rows are outputs.
    """
    library = _library()
    assert library is not None and packed_QKP.is_contiguous()
    assert packed_QKP.shape == packed_shape(*weight_NK.shape)
    weight_NK = weight_NK.contiguous()
    library.ultramem_pack(weight_NK.data_ptr(), *weight_NK.shape, packed_QKP.data_ptr())


def grouped_linear(x_MK: Tensor, packed_XQKP: Tensor, ends_X: Tensor, num_outputs: int) -> Tensor:
    """Multiply runs of rows with their group's weight: ``y = x W_g^T``.

    Args:
        x_MK: fp32 rows, those of group g behind those of group g - 1.
        packed_XQKP: packed weights of all groups; those of groups without rows are not read.
        ends_X: int64, row after the last one of each group; the last is M.
        num_outputs: N, at most ``Q * P``.

    Returns:
        fp32 ``(M, N)``; a view of padded rows where N does not fill its panels.
    """
    library = _library()
    assert library is not None and packed_XQKP.is_contiguous()
    num_groups, num_panels, num_inputs, _ = packed_XQKP.shape
    x_MK = x_MK.contiguous()
    y = x_MK.new_empty(x_MK.shape[0], num_panels * PANEL)
    library.ultramem_grouped_linear(
        x_MK.data_ptr(),
        packed_XQKP.data_ptr(),
        ends_X.data_ptr(),
        num_groups,
        num_panels,
        num_inputs,
        y.data_ptr(),
    )
    return y[:, :num_outputs]


def attend_to_cache(q_BA1K: Tensor, keys_BACK: Tensor, values_BACK: Tensor) -> Tensor:
    """Attention of one new token over everything cached.

    Args:
        q_BA1K: fp32 queries; ``A`` may be a multiple of the cached heads, of which each then serves
            a run of query heads (Ainslie et al., 2023).
        keys_BACK: fp32, K a multiple of 16 and contiguous; positions beyond the end are not given.
        values_BACK: strided like the keys.

    Returns:
        ``(B, A, 1, K)``.
    """
    library = _library()
    B, num_heads, num_positions, width = keys_BACK.shape
    assert library is not None and width % 16 == 0 and q_BA1K.shape[2] == 1
    assert keys_BACK.stride(-1) == 1 and keys_BACK.stride() == values_BACK.stride()
    q_BA1K = q_BA1K.contiguous()
    out_BA1K = torch.empty_like(q_BA1K)
    library.ultramem_attend(
        q_BA1K.data_ptr(),
        keys_BACK.data_ptr(),
        values_BACK.data_ptr(),
        *keys_BACK.stride()[:3],
        B,
        num_heads,
        q_BA1K.shape[1] // num_heads,
        num_positions,
        width,
        width**-0.5,
        out_BA1K.data_ptr(),
    )
    return out_BA1K
