"""A training checkpoint of any world size and partition scheme as a model on one process.

Weights are copied block by block from the ranks' files, which are mapped and not read as a whole.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ultramem_ds.checkpoint.directory import find_checkpoint, read_trainer_state
from ultramem_ds.checkpoint.reader import CheckpointReader
from ultramem_ds.checkpoint.state import MASTER
from ultramem_ds.config.load import from_dict
from ultramem_ds.model.lm import LanguageModel


def load_model(
    path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """Load a run's latest checkpoint, or one checkpoint, for inference.

    Args:
        path: a run directory or a checkpoint directory.
        device: where the model goes.
        dtype: of its weights; the checkpoint's are fp32 masters.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: if the checkpoint is incomplete, damaged or does not fit its own configuration.
    """
    checkpoint = find_checkpoint(path)
    try:
        return _load(checkpoint, device, dtype)
    except ValueError as error:
        raise ValueError(f"{error}; give --checkpoint another of {checkpoint.parent}") from None


def _load(checkpoint: Path, device: torch.device | str, dtype: torch.dtype) -> LanguageModel:
    with torch.device("meta"):
        model = LanguageModel(from_dict(read_trainer_state(checkpoint).config))
    model.to_empty(device=device).to(dtype)
    reader = CheckpointReader(checkpoint)
    with torch.no_grad():
        for name, param in model.named_parameters():
            record = reader.parameters.get(name)
            if record is None or record.shape != tuple(param.shape):
                raise ValueError(f"{checkpoint} does not hold {name} of shape {tuple(param.shape)}")
            block = record.block
            reader.read(name, MASTER, block, param.view(block.num_rows, block.num_columns))
        buffers = dict(model.named_buffers())
        for name, value in reader.buffers().items():
            buffers[name].copy_(value)
    model.mark_stale()
    return model.eval()
