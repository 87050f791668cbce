"""The exported models in vLLM: what ``model.lm.LanguageModel`` computes, on flattened requests.

Letters: T tokens of all requests together, D hidden, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import maybe_prefix
from vllm.sequence import IntermediateTensors

from ultramem_ds.config.schema import Config
from ultramem_ds.infer.prepare import gains_by_packing, pack_linears, search_packed_keys
from ultramem_ds.model.memory.layer import MemoryLayer, PendingMemory
from ultramem_ds.model.memory.scores import TuckerCore
from ultramem_ds.model.placement import Placement
from ultramem_ds.model.transformer import make_norm
from ultramem_ds.vllm.layers import ServedBlock, ServedExperts
from ultramem_ds.vllm.memory import build_memory_layer
from ultramem_ds.vllm.settings import exported_settings
from ultramem_ds.vllm.weights import load_tensors, memory_takers, parameter_takers


class UltraMemModel(nn.Module):
    """Embedding, blocks with memory layers beside them, final norm."""

    def __init__(self, config: Config, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        model = config.model
        self.embedding = VocabParallelEmbedding(model.vocab_size, model.hidden_size)
        self.blocks = nn.ModuleList(
            ServedBlock(config, vllm_config, f"{prefix}.blocks.{i}")
            for i in range(model.num_layers)
        )
        spans = config.memory.spans if config.has_memory else ()
        self.memories = nn.ModuleList(
            build_memory_layer(config, j, prefix) for j in range(len(spans))
        )
        self.placement = Placement.from_spans(spans, model.num_layers)
        self.final_norm = make_norm(model.norm, model.hidden_size, model.norm_eps)

    @property
    def memory_layers(self) -> tuple[MemoryLayer, ...]:
        """The memory layers in order of placement."""
        return tuple(cast(MemoryLayer, memory) for memory in self.memories)

    def forward(self, x_TD: Tensor, positions_T: Tensor) -> Tensor:
        """Normalised hidden states ``(T, D)`` from embedded tokens and their positions."""
        memories = self.memory_layers
        pending: dict[int, PendingMemory] = {}
        for i, block in enumerate(self.blocks):
            out = block(positions_T, x_TD)
            x_TD = out.x_TD
            for j in self.placement.starts[i]:
                pending[j] = memories[j].start(out.mlp_input_TD.unsqueeze(0))
            for j in self.placement.finishes[i]:
                x_TD = x_TD + memories[j].finish(pending.pop(j)).squeeze(0)
        normed_TD: Tensor = self.final_norm(x_TD)
        return normed_TD

    def prepare(self) -> None:
        """Bring loaded weights into the form that decodes fastest here; call once."""
        for block in self.blocks:
            if isinstance(block.mlp, ServedExperts):
                block.mlp.group()
        for layer in self.memory_layers:
            if isinstance(layer.retrieval.form, TuckerCore):
                layer.retrieval.form.keep_directions()
            if gains_by_packing(layer.retrieval.keys.weight):
                pack_linears(layer)
                search_packed_keys(layer)


class UltraMemForCausalLM(nn.Module):
    """vLLM's model of architecture ``UltraMemForCausalLM``; see ``docs/serving.md``.

    It is not decorated for torch.compile: selection and lookup are native calls or Triton kernels
    of our own, which have nothing for inductor to fuse.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        exported = vllm_config.model_config.hf_config
        self.settings = exported_settings(exported)
        model = self.settings.model
        self.num_tokens = exported.tokenizer_vocab_size
        self.num_table_parts = getattr(exported, "memory_table_parts", 1)
        self.model = UltraMemModel(self.settings, vllm_config, maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(model.vocab_size, model.hidden_size)
        self.logits_processor = LogitsProcessor(model.vocab_size)
        self.requires_grad_(False)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """``(T,)`` ids to ``(T, D)``."""
        x_TD: Tensor = self.model.embedding(input_ids)
        return x_TD

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Normalised hidden states ``(T, D)``."""
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed_input_ids(input_ids)
        hidden_TD: Tensor = self.model(inputs_embeds, positions)
        return hidden_TD

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """``(T, W)``, minus infinity at the padding; None on ranks that do not sample."""
        logits_TW: Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        if logits_TW is not None:
            logits_TW[:, self.num_tokens :] = -torch.inf
        return logits_TW

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Take over the tensors of ``docs/export.md``; returns the names of what was filled.

        Raises:
            ValueError: if one is missing, or has no place here.
        """
        takers = parameter_takers(self)
        for j, layer in enumerate(self.model.memory_layers):
            for name, take in memory_takers(layer, self.num_table_parts):
                takers[f"model.memories.{j}.{name}"] = take
        load_tensors(takers, weights)
        self.model.prepare()
        return {name for name, _ in self.named_parameters()}
