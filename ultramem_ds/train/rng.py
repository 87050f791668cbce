"""Random-number states of a rank, as a checkpoint keeps them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ultramem_ds.checkpoint.safe import safe_load
from ultramem_ds.zero.runtime import Ranks


def rng_file(ranks: Ranks) -> str:
    """Name of this rank's file in a checkpoint."""
    return f"rng_rank_{ranks.rank:05d}.pt"


def rng_states(ranks: Ranks) -> dict[str, Tensor]:
    """What the file holds: the generators that dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(ranks.device)
    return states


def load_rng(path: Path, ranks: Ranks) -> None:
    """Go on drawing where the rank that wrote ``path`` was."""
    if not path.exists():  # made by a conversion, not by a run
        return
    states = safe_load(path, mmap=False)
    torch.set_rng_state(states["cpu"])
    if ranks.device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], ranks.device)
