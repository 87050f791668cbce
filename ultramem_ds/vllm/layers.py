"""Attention, MLP and experts of the served model, cut over tensor-parallel ranks as vLLM cuts them.

Letters: T tokens of all requests together, D hidden, F inner width, A attention heads, K head
width, P tensor-parallel ranks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.utils import set_weight_attrs

from ultramem_ds.config.schema import Config, ModelConfig
from ultramem_ds.infer.experts import GroupedExperts
from ultramem_ds.infer.weights import GroupedWeights
from ultramem_ds.model.moe import MixtureOfExperts
from ultramem_ds.model.transformer import FeedForward, make_norm


class PagedAttention(nn.Module):
    """``model.transformer.Attention`` on vLLM's paged cache; heads are cut over ranks."""

    def __init__(self, model: ModelConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        head_dim = model.head_dim
        self.qkv_proj = QKVParallelLinear(
            model.hidden_size, head_dim, model.num_heads, bias=False, prefix=f"{prefix}.qkv_proj"
        )
        self.out_proj = RowParallelLinear(
            model.hidden_size, model.hidden_size, bias=False, prefix=f"{prefix}.out_proj"
        )
        self.rotary = get_rope(
            head_dim,
            max_position=vllm_config.model_config.max_model_len,
            rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        )
        self.attend = Attention(
            model.num_heads // get_tensor_model_parallel_world_size(),
            head_dim,
            scale=head_dim**-0.5,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attend",
        )

    def forward(self, positions_T: Tensor, x_TD: Tensor) -> Tensor:
        """Attend causally within each request; ``(T, D)`` to ``(T, D)``."""
        q_TD, k_TD, v_TD = self.qkv_proj(x_TD)[0].chunk(3, dim=-1)
        q_TD, k_TD = self.rotary(positions_T, q_TD, k_TD)
        y_TD: Tensor = self.out_proj(self.attend(q_TD, k_TD, v_TD))[0]
        return y_TD


class ShardedMLP(nn.Module):
    """``model.transformer.DenseMLP``; the inner width is cut over ranks."""

    def __init__(self, model: ModelConfig, prefix: str) -> None:
        super().__init__()
        self.up_proj = ColumnParallelLinear(
            model.hidden_size, model.inner_size, bias=False, prefix=f"{prefix}.up_proj"
        )
        self.down_proj = RowParallelLinear(
            model.inner_size, model.hidden_size, bias=False, prefix=f"{prefix}.down_proj"
        )

    def forward(self, x_TD: Tensor) -> Tensor:
        """``(T, D)`` to ``(T, D)``."""
        y_TD: Tensor = self.down_proj(F.gelu(self.up_proj(x_TD)[0]))[0]
        return y_TD


class ServedExperts(MixtureOfExperts):
    """``model.moe.MixtureOfExperts``; every expert's inner width is cut over ranks.

    vLLM's fused experts have neither a plain GELU on a CPU nor DeepSpeed's gate (softmax in fp32,
    renormalised only above one expert per token), so the grouped products are those of ``infer``.
    """

    def __init__(self, config: Config) -> None:
        num_ranks = get_tensor_model_parallel_world_size()
        inner_size = config.model.inner_size // num_ranks
        super().__init__(replace(config.model, inner_size=inner_size), config.moe)
        self.num_ranks = num_ranks
        for expert in self.experts:
            assert isinstance(expert, FeedForward)
            set_weight_attrs(expert.up_proj.weight, {"weight_loader": sharded_weight_loader(0)})
            set_weight_attrs(expert.down_proj.weight, {"weight_loader": sharded_weight_loader(1)})
        self.grouped: GroupedExperts | None = None

    def group(self) -> None:
        """Put the loaded experts into one tensor per projection; call once, after loading."""
        self.grouped = GroupedExperts(self, GroupedWeights.pack)

    def forward(self, x_TD: Tensor) -> Tensor:  # type: ignore[override]
        """``(T, D)`` to ``(T, D)``."""
        assert self.grouped is not None
        y_TD = self.grouped(x_TD).y_BSD
        return tensor_model_parallel_all_reduce(y_TD) if self.num_ranks > 1 else y_TD


class BlockOutput(NamedTuple):
    """The residual stream after a block, and the input of its MLP, which memory layers read."""

    x_TD: Tensor
    mlp_input_TD: Tensor


class ServedBlock(nn.Module):
    """``model.transformer.Block`` on flattened requests."""

    def __init__(self, config: Config, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        model = config.model
        self.attention_norm = make_norm(model.norm, model.hidden_size, model.norm_eps)
        self.attention = PagedAttention(model, vllm_config, f"{prefix}.attention")
        self.mlp_norm = make_norm(model.norm, model.hidden_size, model.norm_eps)
        self.mlp: nn.Module = (
            ServedExperts(config) if model.kind == "moe" else ShardedMLP(model, f"{prefix}.mlp")
        )

    def forward(self, positions_T: Tensor, x_TD: Tensor) -> BlockOutput:
        """Run the block."""
        x_TD = x_TD + self.attention(positions_T, self.attention_norm(x_TD))
        mlp_input_TD = self.mlp_norm(x_TD)
        return BlockOutput(x_TD + self.mlp(mlp_input_TD), mlp_input_TD)
