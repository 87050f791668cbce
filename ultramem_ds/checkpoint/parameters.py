"""The parameters that a configuration's checkpoints hold."""

from __future__ import annotations

import torch

from ultramem_ds.checkpoint.record import ParameterRecord
from ultramem_ds.config.schema import Config
from ultramem_ds.model.lm import LanguageModel


def parameter_records(config: Config) -> dict[str, ParameterRecord]:
    """Name and shape of every parameter of the one-process model, from the configuration."""
    with torch.device("meta"):
        model = LanguageModel(config)
    return {
        name: ParameterRecord(tuple(param.shape), getattr(param, "role", None) == "table")
        for name, param in model.named_parameters()
    }
