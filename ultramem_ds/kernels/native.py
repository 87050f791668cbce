"""The native extension's functions for what surrounds the lookup (``csrc/select.cpp, small.cpp``).

They run where the registry picks the ``cpu`` kernel; everywhere else their callers stay with torch.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from ultramem_ds.kernels.cpu import NativeKernel
from ultramem_ds.kernels.registry import resolve

# Argument types: p array, i int64.
_TYPES = {"p": c_void_p, "i": c_int64}
_SIGNATURES = {
    "ultramem_select": "p" + "i" * 3 + "p" * 4 + "i" * 9 + "p" * 3,
    "ultramem_select_backward": "p" * 7 + "i" * 8 + "p" * 4,
    "ultramem_conv": "p" * 4 + "i" * 4 + "p",
    "ultramem_conv_backward": "p" * 4 + "i" * 4 + "pp",
    "ultramem_shuffle": "pipiip",
    "ultramem_split": "piipp",
}


@functools.cache
def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = [_TYPES[kind] for kind in arguments]
        function.restype = None
    return library


def native_library(
    *tensors: Tensor, dtype: torch.dtype = torch.float32, kernel: str = "auto"
) -> ctypes.CDLL | None:
    """The extension, where it computes with such tensors; else None.

    Args:
        tensors: decide by their devices and dtypes.
        dtype: that the functions in question take.
        kernel: as in ``registry.resolve``: only ``cpu`` is native.
    """
    if any(tensor.dtype != dtype or tensor.device.type != "cpu" for tensor in tensors):
        return None
    chosen = resolve(kernel, torch.device("cpu"))
    return _declared(chosen.library) if isinstance(chosen, NativeKernel) else None


def address(tensor: Tensor | None) -> int | None:
    """What C++ gets for a contiguous tensor, or a null pointer for none."""
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()
