"""A checkpoint opened for inference where the command stands: one process, or ranks of a launcher.

On one process the whole model is there. Under the launcher the ranks share value tables and
experts, so that a model that no device could hold is evaluated; every forward is then a collective.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import torch

from ultramem_ds.checkpoint.directory import run_dir_of
from ultramem_ds.data.tokenizers import Tokenizer, load_tokenizer
from ultramem_ds.infer.load import load_model, load_sharded_model
from ultramem_ds.infer.peers import ALONE, Peers
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.sharding.comm import Comm
from ultramem_ds.zero.runtime import runtime

Precision: TypeAlias = Literal["auto", "fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class Session:
    """What inference needs.

    Attributes:
        model: in evaluation mode; whole, or this rank's part with sharded lookups.
        tokenizer: of its run directory.
        device: where the model is.
        peers: the other ranks, if any.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    device: torch.device
    peers: Peers

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.peers.rank == 0


def resolve_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of the weights: ``auto`` is bf16 on an accelerator and fp32 on a CPU."""
    if precision == "auto":
        precision = "fp32" if device.type == "cpu" else "bf16"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def num_ranks() -> int:
    """Ranks that a launcher has started, 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def open_checkpoint(path: Path, precision: Precision = "auto") -> Iterator[Session]:
    """Load a checkpoint on the device that is there, over all ranks of the launcher.

    Args:
        path: a run directory or a checkpoint directory.
        precision: of the weights.

    Raises:
        ValueError: on every rank, if the checkpoint cannot be used.
    """
    tokenizer = load_tokenizer(run_dir_of(path))
    if num_ranks() == 1:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = load_model(path, device, resolve_dtype(precision, device))
        yield Session(model, tokenizer, device, ALONE)
        return
    with runtime() as ranks:
        comm = Comm()
        dtype = resolve_dtype(precision, ranks.device)
        model = load_sharded_model(path, comm, ranks.device, dtype)
        yield Session(model, tokenizer, ranks.device, comm)
