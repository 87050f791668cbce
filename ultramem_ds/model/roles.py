"""Tags that a parameter gets where it is created, so that nobody guesses roles from names."""

from __future__ import annotations

from typing import Literal, TypeAlias

from torch import Tensor

Role: TypeAlias = Literal["matrix", "norm", "embedding", "table", "core"]


def tag(param: Tensor, *, role: Role, init: str) -> None:
    """Mark a parameter.

    Args:
        param: A module's parameter; gets the attributes ``role`` and ``init``.
        role: The optimizer's group: matrices, cores and tables decay, norms may, embeddings ...
        init: Its line in ``model.init.INITIALISERS``.
    """
    param.role = role  # type: ignore[attr-defined]
    param.init = init  # type: ignore[attr-defined]
