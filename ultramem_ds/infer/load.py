"""A training checkpoint of any world size as a model on one process.

Weights are streamed into place parameter by parameter from DeepSpeed's files.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ultramem_ds.config.load import from_dict
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.sharding.experts import canonical_name
from ultramem_ds.train.checkpoint import TrainerState, find_checkpoint, read_trainer_state


def load_model(
    path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """Load a run's latest checkpoint, or one checkpoint, for inference.

    Args:
        path: a run directory or a checkpoint directory.
        device: where the model goes.
        dtype: of its weights, whatever dtype the checkpoint stores.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: if the checkpoint is incomplete or does not fit its own configuration.
    """
    checkpoint = find_checkpoint(path)
    state = read_trainer_state(checkpoint)
    with torch.device("meta"):
        model = LanguageModel(from_dict(state.config))
    model.to_empty(device=device).to(dtype)
    wanted: dict[str, Tensor] = dict(model.named_parameters())
    wanted |= {n: b for n, b in model.named_buffers() if n in model.state_dict()}
    missing = set(wanted)
    for name, value in _stored(checkpoint, state, model):
        if name not in wanted:
            raise ValueError(f"{checkpoint} holds {name}, which its own configuration lacks")
        target = wanted[name]
        with torch.no_grad():
            target.copy_(value.reshape(-1)[: target.numel()].view_as(target))
        missing.discard(name)
    if missing:
        raise ValueError(f"{checkpoint} lacks {sorted(missing)[0]} and {len(missing) - 1} more")
    model.mark_stale()
    return model.eval()


def _stored(
    checkpoint: Path, state: TrainerState, model: LanguageModel
) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(name, value)`` under the one-process model's names."""
    if model.config.model.kind == "moe":
        yield from _stored_moe(checkpoint)
        return
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(sys.stderr):
        lazy = get_fp32_state_dict_from_zero_checkpoint(
            str(checkpoint.parent), tag=checkpoint.name, lazy_mode=True
        )
    for name, value in lazy.items():
        with contextlib.redirect_stdout(sys.stderr):
            whole = value.contiguous()
        yield name, whole


def _stored_moe(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """DeepSpeed-MoE: shared weights in one file, each expert of each layer in its own."""
    shared = torch.load(
        checkpoint / "mp_rank_00_model_states.pt", map_location="cpu", mmap=True, weights_only=False
    )
    for name, value in shared["module"].items():
        yield canonical_name(name, 0), value
    for file in sorted(checkpoint.glob("layer_*_expert_*_mp_rank_00_model_states.pt")):
        for name, value in torch.load(file, map_location="cpu", mmap=True).items():
            yield canonical_name(name, 0), value
