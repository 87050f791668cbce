"""One rank's part of a checkpoint on its way to disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ultramem_ds.checkpoint.record import Store, write_rank_layout


@dataclass(frozen=True)
class RankFiles:
    """One rank's part of a checkpoint, not yet on disk.

    Attributes:
        rank: whose.
        sources: what gives the object that ``torch.save`` is to write, by file name.
        stores: where optimizer state lies in those files.
    """

    rank: int
    sources: dict[str, Callable[[], Any]]
    stores: dict[str, Store]

    def write(self, checkpoint: Path) -> None:
        """Write and fsync everything, this rank's record last.

        Raises:
            OSError: a file could not be written completely.
        """
        checkpoint.mkdir(parents=True, exist_ok=True)
        for name, source in self.sources.items():
            _write(checkpoint / name, source())
        write_rank_layout(checkpoint, self.rank, self.stores, self.sources)


def _write(path: Path, value: Any) -> None:
    """``torch.save``, whose zip writer may turn the error of a full disk into its own."""
    try:
        with open(path, "wb") as file:
            torch.save(value, file)
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise (cause or OSError(str(error))) from None
