"""An exported ``config.json`` as vLLM carries it about, and as our modules want it."""

from __future__ import annotations

from transformers import PreTrainedConfig

from ultramem_ds.config.schema import Config
from ultramem_ds.exchange.architecture import MODEL_TYPE, training_config


class ExportedConfig(PreTrainedConfig):
    """``config.json`` as it is: every key an attribute.

    Not the class of ``ultramem_ds.hf``, whose package imports models that need a newer transformers
    than vLLM allows.
    """

    model_type = MODEL_TYPE


def exported_settings(exported: ExportedConfig) -> Config:
    """What the exported model is built from.

    Raises:
        ValueError: it is no configuration of this format, or of a newer one.
    """
    return training_config(exported.to_dict(), run=None)
