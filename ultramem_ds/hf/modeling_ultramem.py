"""Dense, PKM, MoE and UltraMem decoders for transformers: one model family (docs/export.md).

Parameters have the names of ``ultramem_ds.model.lm.LanguageModel``. An exported directory carries
this file, with everything of this project that it needs written into it (``hf/bundle.py``).

Letters: B sequences, S new positions, T = B*S, D hidden, A attention heads, K head width, F inner
width, X experts, W vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask, create_recurrent_attention_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.utils.generic import can_return_tuple

from ultramem_ds.hf.blocks_ultramem import UltraMemBlock, UltraMemMLP
from ultramem_ds.hf.configuration_ultramem import UltraMemConfig
from ultramem_ds.hf.conversion_ultramem import register_conversion
from ultramem_ds.hf.memory_ultramem import (
    BijectionShuffle,
    StoredShuffle,
    UltraMemConv,
    UltraMemCore,
    UltraMemKeys,
    UltraMemMemory,
    UltraMemTable,
    make_norm,
    residual_std,
)
from ultramem_ds.model.transformer import rotary_tables


@use_experts_implementation(has_gate=False)
class UltraMemExperts(nn.Module):
    """All experts of a block, stacked as transformers' grouped products want them."""

    def __init__(self, config: UltraMemConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        shape = (config.num_experts, config.intermediate_size, config.hidden_size)
        self.up_proj = nn.Parameter(torch.empty(shape))
        self.down_proj = nn.Parameter(torch.empty(shape[0], shape[2], shape[1]))
        self.act_fn = nn.GELU()

    def forward(self, x_TD: Tensor, experts_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
        """Sum of the chosen experts' outputs, weighted in fp32, one expert after the other."""
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for expert in experts_Tk.unique().tolist():
            tokens, choices = torch.where(experts_Tk == expert)
            inner = self.act_fn(F.linear(x_TD[tokens], self.up_proj[expert]))
            out = F.linear(inner, self.down_proj[expert]).float()
            y_TD = y_TD.index_add(0, tokens, out * weights_Tk[tokens, choices, None])
        return y_TD.to(x_TD.dtype)


class UltraMemGate(nn.Linear):
    """The gate's logits, in fp32 whatever the weights are."""

    def forward(self, x_TD: Tensor) -> Tensor:
        """``(T, D)`` to ``(T, X)``."""
        return F.linear(x_TD.float(), self.weight.float())


class UltraMemMoE(nn.Module):
    """Top-k gated experts; nothing is dropped."""

    def __init__(self, config: UltraMemConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = UltraMemGate(config.hidden_size, config.num_experts, bias=False)
        self.experts = UltraMemExperts(config)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted sum, and the unweighted balance loss (Fedus et al., 2022)."""
        x_TD = x_BSD.flatten(0, 1)
        gates_TX = self.gate(x_TD).softmax(dim=-1)
        weights_Tk, experts_Tk = gates_TX.topk(self.top_k, dim=-1)
        num_experts = gates_TX.shape[-1]
        first_TX = F.one_hot(experts_Tk[:, 0], num_experts).float()
        balance_loss = num_experts * (gates_TX.mean(0) * first_TX.mean(0)).sum()
        if self.top_k > 1:
            weights_Tk = weights_Tk / weights_Tk.sum(-1, keepdim=True)
        return self.experts(x_TD, experts_Tk, weights_Tk).view_as(x_BSD), balance_loss


register_conversion()


class UltraMemPreTrainedModel(PreTrainedModel):
    """What :class:`UltraMemModel` and :class:`UltraMemForCausalLM` share."""

    config: UltraMemConfig
    config_class = UltraMemConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["UltraMemBlock", "UltraMemMemory"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """See transformers; with ``memory_device``, ``device_map`` is where the rest goes."""
        device_map = kwargs.get("device_map")
        if device_map is None:
            return super().from_pretrained(*args, **kwargs)
        config = kwargs.get("config")
        memory_device = kwargs.get("memory_device") or getattr(config, "memory_device", None)
        if memory_device is None:
            return super().from_pretrained(*args, **kwargs)
        device = device_map.get("") if isinstance(device_map, dict) else device_map
        if device is None or device in ("auto", "balanced", "balanced_low_0", "sequential"):
            raise ValueError(
                f"memory_device={memory_device} needs the one device that the rest goes to as "
                f"device_map, not {device_map!r}"
            )
        kwargs.pop("device_map")
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).to(device)
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fill what no checkpoint has filled: the paper's initialisation, PKM's for product keys.

        Buffers are computed, not drawn.
        """
        config = self.config
        tucker = config.memory_retrieval == "tdqkr"
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            init.constant_(module.weight, getattr(module, "init_value", 1.0))
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=config.embedding_initializer_range)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=getattr(module, "init_std", config.initializer_range))
        elif isinstance(module, UltraMemExperts):
            init.normal_(module.up_proj, std=config.initializer_range)
            init.normal_(module.down_proj, std=residual_std(config))
        elif isinstance(module, UltraMemConv):  # the identity
            taps = torch.zeros_like(module.weight)
            taps[-1] = 1
            init.copy_(module.weight, taps)
        elif isinstance(module, UltraMemKeys):
            init.normal_(module.weight, std=config.memory_kdim**-0.5)
        elif isinstance(module, UltraMemCore):
            rank = config.memory_tucker_rank
            init.normal_(module.core, std=1 / (rank * config.memory_num_cores**0.5))
            init.zeros_(module.directions)
            module.refresh()
        elif isinstance(module, BijectionShuffle):
            init.copy_(module.rounds, module.fresh())
        elif isinstance(module, StoredShuffle):
            init.copy_(module.index, module.fresh())
        elif isinstance(module, UltraMemTable):
            selected = 2 * config.memory_top_m * config.memory_num_heads * config.num_hidden_layers
            paper = (config.memory_expansion / selected) ** 0.5
            init.normal_(module.weight, std=paper if tucker else config.memory_value_dim**-0.5)


@dataclass
class UltraMemModelOutput(BaseModelOutputWithPast):
    """Also the weighted auxiliary losses of a training forward (eq. 12 and load balance)."""

    aux_loss: Tensor | None = None


class UltraMemModel(UltraMemPreTrainedModel):
    """Embedding, blocks with memory layers beside them, final norm."""

    def __init__(self, config: UltraMemConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        moe = config.kind == "moe"
        self.blocks = nn.ModuleList(
            UltraMemBlock(config, i, UltraMemMoE(config) if moe else UltraMemMLP(config))
            for i in range(config.num_hidden_layers)
        )
        blocks = range(1, config.num_hidden_layers + 1)
        spans = list(enumerate(config.memory_spans))
        self.starts = [[j for j, (a, _) in spans if a == block] for block in blocks]
        self.finishes = [[j for j, (_, b) in spans if b == block] for block in blocks]
        self.memories = nn.ModuleList(
            UltraMemMemory(config, j, a - 1, self.starts[a - 1].index(j)) for j, (a, _) in spans
        )
        self.final_norm = make_norm(config.norm_type, config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.embedding = value  # type: ignore[assignment]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Any] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> UltraMemModelOutput:
        """Hidden states; arguments as everywhere in transformers.

        Positions of padding on the left are seen by nobody, the query convolution included.
        ``position_ids`` without mask and cache that start over pack several documents in a row.
        """
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embedding(input_ids)
        x_BSD = self.dropout(inputs_embeds)
        if use_cache is None:
            use_cache = config.use_cache and not self.training
        if self.gradient_checkpointing and self.training:
            use_cache, past_key_values = False, None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        doc_boundaries_BS = None
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(x_BSD.shape[1], device=x_BSD.device)[None] + seen
        elif attention_mask is None and past_key_values is None:
            steps_BS = position_ids.diff(dim=-1, prepend=position_ids[:, :1])
            doc_boundaries_BS = (steps_BS != 1).expand(x_BSD.shape[:2])
        if isinstance(attention_mask, dict):
            masks = attention_mask
        else:
            masks = self._masks(x_BSD, attention_mask, past_key_values, position_ids)
        rotary = rotary_tables(
            position_ids, config.head_dim, config.rope_parameters["rope_theta"], x_BSD.dtype
        )
        states, attentions, pending = [x_BSD], [], {}
        aux_loss = x_BSD.new_zeros((), dtype=torch.float32)
        for i, block in enumerate(self.blocks):
            x_BSD, mlp_input_BSD, balance_loss, weights = block(
                x_BSD, rotary, masks["full_attention"], past_key_values=past_key_values, **kwargs
            )
            attentions.append(weights)
            if balance_loss is not None:
                aux_loss = aux_loss + config.router_aux_loss_coef * balance_loss.to(aux_loss.device)
            for j in self.starts[i]:
                pending[j], memory_loss = self.memories[j](
                    mlp_input_BSD, masks.get("linear_attention"), doc_boundaries_BS, past_key_values
                )
                aux_loss = aux_loss + config.memory_aux_loss_weight * memory_loss
            for j in self.finishes[i]:
                x_BSD = x_BSD + pending.pop(j).to(x_BSD.device)
            states.append(x_BSD)
        x_BSD = self.final_norm(x_BSD)
        wants_states = (
            config.output_hidden_states if output_hidden_states is None else (output_hidden_states)
        )
        wants_attentions = (
            config.output_attentions if output_attentions is None else (output_attentions)
        )
        return UltraMemModelOutput(
            last_hidden_state=x_BSD,
            past_key_values=past_key_values,
            hidden_states=(*states[:-1], x_BSD) if wants_states else None,
            attentions=tuple(attentions) if wants_attentions else None,
            aux_loss=aux_loss if self.training else None,
        )

    def _masks(
        self,
        x_BSD: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        position_ids: Tensor,
    ) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "config": self.config,
            "inputs_embeds": x_BSD,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "position_ids": position_ids,
        }
        return {
            "full_attention": create_causal_mask(**arguments),
            "linear_attention": create_recurrent_attention_mask(**arguments),
        }


class UltraMemForCausalLM(UltraMemPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: UltraMemConfig) -> None:
        super().__init__(config)
        self.model = UltraMemModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the head."""
        self.lm_head = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Any] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss of ``labels``; in training with the auxiliary losses added."""
        out: UltraMemModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            **kwargs,
        )
        assert out.last_hidden_state is not None
        logits = self.lm_head(slice_logits_to_keep(out.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
            if out.aux_loss is not None:
                loss = loss + out.aux_loss.to(loss.device)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
