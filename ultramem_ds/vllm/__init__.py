"""Serving with vLLM: a plugin for exported models of all four kinds (docs/serving.md).

vLLM calls :func:`register` in each of its processes, through the entry point group
``vllm.general_plugins``. Nothing here needs DeepSpeed.
"""

from __future__ import annotations

ARCHITECTURE = "UltraMemForCausalLM"


def register() -> None:
    """Tell vLLM and transformers of the model; the model itself is imported when it is used."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from ultramem_ds.vllm.rules import ServingRules
    from ultramem_ds.vllm.settings import ExportedConfig

    AutoConfig.register(ExportedConfig.model_type, ExportedConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, f"ultramem_ds.vllm.model:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = ServingRules
