"""Where inference runs, and a checkpoint loaded there: one process, or ranks of a launcher.

On one process the whole model is there. Under the launcher the ranks share value tables and
experts, so that a model that no device could hold is evaluated; every forward is then a collective.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ultramem_ds.infer.load import load_sharded, load_whole
from ultramem_ds.infer.peers import ALONE, Peers
from ultramem_ds.infer.precision import Precision
from ultramem_ds.infer.source import Source
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.sharding.comm import Comm
from ultramem_ds.utils.environment import adopt


@dataclass(frozen=True)
class Place:
    """Where a command runs.

    Attributes:
        device: of this process.
        comm: all ranks; None on one process.
    """

    device: torch.device
    comm: Comm | None

    @property
    def peers(self) -> Peers:
        """The ranks that share a model."""
        return self.comm if self.comm is not None else ALONE

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.peers.rank == 0

    def load(self, source: Source, precision: Precision = "auto") -> LanguageModel:
        """A trained model: whole on one process, else this rank's part with sharded lookups.

        Args:
            source: of ``infer.source.open_source``.
            precision: of the weights.

        Raises:
            ValueError: on every rank, if the checkpoint cannot be used.
        """
        dtype = resolve_dtype(precision, self.device)
        if self.comm is None:
            return load_whole(source, self.device, dtype)
        return load_sharded(source, self.comm, self.device, dtype)


def resolve_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of the weights: ``auto`` is bf16 on an accelerator and fp32 on a CPU."""
    if precision == "auto":
        precision = "fp32" if device.type == "cpu" else "bf16"
    return torch.bfloat16 if precision == "bf16" else torch.float32


@contextlib.contextmanager
def place() -> Iterator[Place]:
    """Join the ranks that a launcher has started, if it has."""
    if adopt().size == 1:
        yield Place(torch.device("cuda" if torch.cuda.is_available() else "cpu"), None)
        return
    from ultramem_ds.zero.runtime import runtime  # DeepSpeed, which one process does not need

    with runtime() as ranks:
        yield Place(ranks.device, Comm())
