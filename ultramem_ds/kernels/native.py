"""The native extension as ctypes sees it: one table of its functions, loaded once."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# p array, i int64, f float, d double; the result is int64 ("i") or none. Functions whose arguments
# begin with "t" take the table's dtype as a code of _DTYPE_CODES.
_TYPES: dict[str, Any] = {
    "p": c_void_p, "i": c_int64, "f": c_float, "d": c_double, "t": c_int32, "": None,
}  # fmt: skip
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}  # as in dispatch() of C++
_SIGNATURES = {
    # lookup.cpp
    "ultramem_pool": ("tpiippppiiiiip", "i"),
    "ultramem_entry_dots": ("tpiippiipip", "i"),
    "ultramem_backward": ("tpiippppiipipp", "i"),
    "ultramem_row_adam": ("tpiippppddddddd", ""),
    # select.cpp
    "ultramem_select": ("p" + "i" * 3 + "p" * 4 + "i" * 9 + "p" * 3, ""),
    "ultramem_select_backward": ("p" * 7 + "i" * 8 + "p" * 4, ""),
    # small.cpp
    "ultramem_conv": ("p" * 4 + "i" * 4 + "p", ""),
    "ultramem_conv_backward": ("p" * 4 + "i" * 4 + "pp", ""),
    "ultramem_shuffle": ("pipiip", ""),
    "ultramem_split": ("piipp", ""),
    # packed.cpp, attend.cpp
    "ultramem_pack": ("piip", ""),
    "ultramem_grouped_linear": ("pppiiip", ""),
    "ultramem_attend": ("ppp" + "i" * 8 + "fp", ""),
}


def load_library(path: Path) -> ctypes.CDLL:
    """Load the built extension and declare its functions.

    Raises:
        OSError: the file cannot be loaded.
    """
    library = ctypes.CDLL(str(path))
    for name, (arguments, result) in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = [_TYPES[kind] for kind in arguments]
        function.restype = _TYPES[result]
    return library


def dtype_code(tensor: Tensor) -> int:
    """The number by which C++ knows the tensor's dtype."""
    return _DTYPE_CODES[tensor.dtype]


def address(tensor: Tensor | None) -> int | None:
    """What C++ gets for a tensor, or a null pointer for none.

    Only dense memory crosses: C++ knows no strides, and a view that expands one element has not the
    elements that its shape promises.
    """
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()
