"""The pre-norm decoder block that every kind shares: rotary attention and an MLP.

Nothing here knows of ranks. An MLP is anything that maps ``(B, S, D)`` to an :class:`MLPOutput`:
the dense one below, the local mixture of experts of ``model/moe``, or DeepSpeed's, which
``zero/parallelize`` installs.

Letters: B sequences, S tokens per sequence, D hidden, A attention heads, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultramem_ds.config.schema import ModelConfig
from ultramem_ds.kernels import resolve
from ultramem_ds.kernels.base import Kernel
from ultramem_ds.model.roles import tag


class KVSlot(Protocol):
    """One block's key/value cache (``infer/cache.py``)."""

    def update(self, keys_BASK: Tensor, values_BASK: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new positions; return all keys and values so far, ``(B, A, S_total, K)``."""
        ...


@dataclass(frozen=True)
class AttentionContext:
    """What every block of one forward shares.

    Attributes:
        cos_BSK: cosines of the rotary angles, ``(1 or B, S, K)``, the activations' dtype.
        sin_BSK: sines, same shape.
        mask_BSS: True where a query (row) may attend to a key (column), ``(1 or B, 1, S,
            S_total)``; None means plain causal attention (of one query: to all).
    """

    cos_BSK: Tensor
    sin_BSK: Tensor
    mask_BSS: Tensor | None = None


def rotary_tables(
    positions_BS: Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary embeddings (Su et al., 2024), half-split convention.

    Args:
        positions_BS: integer positions, ``(1 or B, S)``.
        head_dim: width K of one head, even.
        theta: base of the frequencies.
        dtype: of the result; angles are computed in fp32.

    Returns:
        ``cos_BSK`` and ``sin_BSK``.
    """
    exponent = torch.arange(0, head_dim, 2, device=positions_BS.device, dtype=torch.float32)
    angles = positions_BS.float().unsqueeze(-1) * theta ** (-exponent / head_dim)
    angles_BSK = torch.cat((angles, angles), dim=-1)
    return angles_BSK.cos().to(dtype), angles_BSK.sin().to(dtype)


def rotate(x_BASK: Tensor, cos_BSK: Tensor, sin_BSK: Tensor) -> Tensor:
    """Turn queries or keys ``(..., B, A, S, K)`` by their positions' angles: ``rotary_tables``."""
    half = x_BASK.shape[-1] // 2
    turned = torch.cat((-x_BASK[..., half:], x_BASK[..., :half]), dim=-1)
    return x_BASK * cos_BSK.unsqueeze(1) + turned * sin_BSK.unsqueeze(1)


def make_norm(kind: Literal["layernorm", "rmsnorm"], width: int, eps: float) -> nn.Module:
    """A weight-only LayerNorm or RMSNorm over the last dimension, tagged as role ``norm``."""
    norm: nn.LayerNorm | nn.RMSNorm
    if kind == "layernorm":
        norm = nn.LayerNorm(width, eps=eps, bias=False)
    else:
        norm = nn.RMSNorm(width, eps=eps)
    tag(norm.weight, role="norm", init="norm")
    return norm


def make_linear(in_features: int, out_features: int, init: str = "matrix") -> nn.Linear:
    """A bias-free linear map of role ``matrix``, filled as line ``init`` of ``model/init.py``."""
    linear = nn.Linear(in_features, out_features, bias=False)
    tag(linear.weight, role="matrix", init=init)
    return linear


class Attention(nn.Module):
    """Multi-head self-attention with rotary embeddings.

    Attributes:
        kernel: does the attention; None: the device's.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.kernel: Kernel | None = None
        self.qkv_proj = make_linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = make_linear(config.hidden_size, config.hidden_size, init="residual")

    def project(self, x_BSD: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, each ``(B, A, S, K)``."""
        B, S, D = x_BSD.shape
        qkv = self.qkv_proj(x_BSD).view(B, S, 3, self.num_heads, D // self.num_heads)
        qkv_3BASK = qkv.permute(2, 0, 3, 1, 4)
        # Queries and keys at once: half the launches, the same bits.
        q_BASK, k_BASK = rotate(qkv_3BASK[:2], context.cos_BSK, context.sin_BSK).unbind(0)
        return q_BASK, k_BASK, qkv_3BASK[2]

    def forward(self, x_BSD: Tensor, context: AttentionContext, kv: KVSlot | None = None) -> Tensor:
        """Attend causally; ``(B, S, D)`` to ``(B, S, D)``."""
        q_BASK, k_BASK, v_BASK = self.project(x_BSD, context)
        if kv is not None:
            k_BASK, v_BASK = kv.update(k_BASK, v_BASK)
        dropout = self.dropout if self.training else 0.0
        kernel = self.kernel or resolve("auto", q_BASK.device)
        out_BASK = kernel.attend(q_BASK, k_BASK, v_BASK, context.mask_BSS, dropout)
        return self.out_proj(out_BASK.transpose(1, 2).reshape(x_BSD.shape))


class FeedForward(nn.Module):
    """Two bias-free linear maps around a GELU: ``(..., D)`` to ``(..., D)``. Also one expert."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.up_proj = make_linear(hidden_size, inner_size)
        self.down_proj = make_linear(inner_size, hidden_size, init="residual")

    def forward(self, x: Tensor) -> Tensor:
        """Apply the two maps."""
        return self.down_proj(F.gelu(self.up_proj(x)))


class MLPOutput(NamedTuple):
    """What any MLP of a block returns."""

    y_BSD: Tensor
    balance_loss: Tensor | None = None  # unweighted load-balance loss, 0-dim; None where dense
    expert_counts: Tensor | None = None  # (experts,) tokens routed to each; None where dense


class DenseMLP(FeedForward):
    """The dense transformer's MLP: a :class:`FeedForward` without losses."""

    def forward(self, x: Tensor) -> MLPOutput:  # type: ignore[override]
        """Apply the MLP; ``(B, S, D)`` to ``(B, S, D)``."""
        return MLPOutput(super().forward(x))


class BlockOutput(NamedTuple):
    """A block's residual stream, the input of its MLP, and what its MLP reports."""

    x_BSD: Tensor
    mlp_input_BSD: Tensor  # what a memory layer placed at this block reads (paper section 3.2)
    balance_loss: Tensor | None
    expert_counts: Tensor | None


class Block(nn.Module):
    """Pre-norm block: attention and MLP, each added to the residual stream.

    Args:
        config: shapes, norm and dropout.
        mlp: maps ``(B, S, D)`` to an :class:`MLPOutput`.
    """

    def __init__(self, config: ModelConfig, mlp: nn.Module) -> None:
        super().__init__()
        self.attention_norm = make_norm(config.norm, config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config.norm, config.hidden_size, config.norm_eps)
        self.mlp = mlp
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x_BSD: Tensor, context: AttentionContext, kv: KVSlot | None = None
    ) -> BlockOutput:
        """Run the block; also hand out the MLP's input, which memory layers read."""
        attended = self.attention(self.attention_norm(x_BSD), context, kv)
        x_BSD = x_BSD + self.dropout(attended)
        mlp_input_BSD = self.mlp_norm(x_BSD)
        mlp = self.mlp(mlp_input_BSD)
        return BlockOutput(
            x_BSD + self.dropout(mlp.y_BSD), mlp_input_BSD, mlp.balance_loss, mlp.expert_counts
        )
