"""The pre-norm block: rotary attention through transformers' interface, and an MLP.

Letters: B sequences, S new positions, D hidden, A attention heads, K head width, F inner width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ultramem_ds.hf.configuration_ultramem import UltraMemConfig
from ultramem_ds.hf.memory_ultramem import make_norm, residual_std
from ultramem_ds.model.transformer import rotate


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out; ``(B, A, S, K)`` to ``(B, S, A, K)``, and its weights."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    dropped = F.dropout(weights, p=dropout, training=module.training)
    return (dropped @ value).transpose(1, 2).contiguous(), weights


class UltraMemAttention(nn.Module):
    """Multi-head self-attention with rotary positions, one packed projection."""

    def __init__(self, config: UltraMemConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = 1
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        width = config.hidden_size
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.out_proj.init_std = residual_std(config)  # type: ignore[assignment]

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend causally."""
        B, S, _ = x_BSD.shape
        qkv = self.qkv_proj(x_BSD).view(B, S, 3, -1, self.head_dim)
        qkv_3BASK = qkv.permute(2, 0, 3, 1, 4)
        q_BASK, k_BASK = rotate(qkv_3BASK[:2], *rotary).unbind(0)
        v_BASK = qkv_3BASK[2]
        if past_key_values is not None:
            k_BASK, v_BASK = past_key_values.update(k_BASK, v_BASK, self.layer_idx)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        out_BSAK, weights = attend(
            self,
            q_BASK,
            k_BASK,
            v_BASK,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.out_proj(out_BSAK.reshape(B, S, -1).contiguous()), weights


class UltraMemMLP(nn.Module):
    """Two linear maps around a GELU."""

    def __init__(self, config: UltraMemConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.down_proj.init_std = residual_std(config)  # type: ignore[assignment]

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, None]:
        """The MLP, and no balance loss."""
        return self.down_proj(F.gelu(self.up_proj(x_BSD))), None


class UltraMemBlock(GradientCheckpointingLayer):
    """Pre-norm block; also hands out the input of its MLP, which memory layers read.

    Args:
        config: shapes, norm and dropout.
        layer_idx: number of the block, from 0.
        mlp: gives its output and a balance loss or None.
    """

    def __init__(self, config: UltraMemConfig, layer_idx: int, mlp: nn.Module) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.norm_eps
        self.attention_norm = make_norm(config.norm_type, width, eps)
        self.attention = UltraMemAttention(config, layer_idx)
        self.mlp_norm = make_norm(config.norm_type, width, eps)
        self.mlp = mlp
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Residual stream, MLP input, balance loss, attention weights."""
        attended, weights = self.attention(
            self.attention_norm(x_BSD), rotary, attention_mask, past_key_values, **kwargs
        )
        x_BSD = x_BSD + self.dropout(attended)
        mlp_input_BSD = self.mlp_norm(x_BSD)
        y_BSD, balance_loss = self.mlp(mlp_input_BSD)
        return x_BSD + self.dropout(y_BSD), mlp_input_BSD, balance_loss, weights
