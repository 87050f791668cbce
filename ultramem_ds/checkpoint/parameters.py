"""The parameters that a configuration's checkpoints hold."""

from __future__ import annotations

from unittest import mock

import torch
from torch import nn

from ultramem_ds.checkpoint.record import ParameterRecord
from ultramem_ds.config.schema import Config
from ultramem_ds.model.lm import LanguageModel


def parameter_records(config: Config) -> dict[str, ParameterRecord]:
    """Name and shape of every parameter of the one-process model, from the configuration."""
    # Drawing values that nobody sees would load torch's compiler on the meta device.
    with torch.device("meta"), mock.patch.object(nn.init, "normal_"):
        model = LanguageModel(config)
    return {
        name: ParameterRecord(tuple(param.shape), getattr(param, "role", None) == "table")
        for name, param in model.named_parameters()
    }
