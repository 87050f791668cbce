"""torch's AdamW without torch's compiler.

torch marks parts of its optimizers as never to be compiled, and loads its compiler (with Triton and
SymPy, about 170 MB in every process and seconds of every start) to say so: when one is constructed
and in every step. Here those parts run as they were written.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

_BASE = torch.optim.AdamW
_step = inspect.unwrap(_BASE.step)


class AdamW(_BASE):
    """:class:`torch.optim.AdamW`; its arithmetic is torch's own, on the same kernels."""

    add_param_group = inspect.unwrap(_BASE.add_param_group)
    zero_grad = inspect.unwrap(_BASE.zero_grad)
    state_dict = inspect.unwrap(_BASE.state_dict)
    load_state_dict = inspect.unwrap(_BASE.load_state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; see :meth:`torch.optim.AdamW.step`."""
        return _step(self, closure)
