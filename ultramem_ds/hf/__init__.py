"""The model family for transformers; importing this package registers it with the Auto classes."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ultramem_ds.hf.configuration_ultramem import UltraMemConfig
from ultramem_ds.hf.modeling_ultramem import UltraMemForCausalLM, UltraMemModel

AutoConfig.register(UltraMemConfig.model_type, UltraMemConfig, exist_ok=True)
AutoModel.register(UltraMemConfig, UltraMemModel, exist_ok=True)
AutoModelForCausalLM.register(UltraMemConfig, UltraMemForCausalLM, exist_ok=True)

__all__ = ["UltraMemConfig", "UltraMemForCausalLM", "UltraMemModel"]
