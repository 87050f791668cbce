"""Counts where the host asks the device for a number, and so waits for it.

On a GPU such a question stops the host until everything launched before has run. A CPU answers at
once and shows nothing, so the questions themselves are counted: tensors turned into Python numbers
or moved to the CPU, and operators whose result's size the device must tell first.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that ask for a size or a value; an index by a boolean mask is one of them too.
_SIZED_BY_DATA = {
    "nonzero",
    "masked_select",
    "unique",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "is_nonzero",
    "equal",
    # They look at the decomposition's error code.
    "_linalg_svd",
    "_linalg_eigh",
    "linalg_lu_factor_ex",
}
_METHODS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


class _Watch(TorchDispatchMode):
    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        unsized = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in _SIZED_BY_DATA or unsized:
            self.seen[name] += 1
        elif name in ("index", "index_put", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in args[1]
        ):
            self.seen[f"{name} by a mask"] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def count_host_syncs() -> Iterator[Counter[str]]:
    """Count inside, by what was called. Work of this thread, its autograd thread's included."""
    seen: Counter[str] = Counter()
    depth = 0

    def counted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            seen[name] += depth == 0
            depth += 1  # a method built on another asks once
            try:
                return method(self, *args, **kwargs)
            finally:
                depth -= 1

        return call

    with contextlib.ExitStack() as stack:
        for name in _METHODS:
            stack.enter_context(
                mock.patch.object(Tensor, name, counted(name, getattr(Tensor, name)))
            )
        stack.enter_context(_Watch(seen))
        yield seen
