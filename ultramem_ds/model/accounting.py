"""Parameters and FLOPs of a configuration, predicted without building the model.

Convention (reproduces Tables 1, 2 and 6): no biases anywhere; ``params`` excludes the embedding,
the head and the one-dimensional norm weights, which are counted apart; FLOPs per token are twice
the matrix parameters one token activates. Letters: D hidden, L layers, H memory heads, r Tucker
rank, h cores, n keys per side, E expansion, N physical rows, V value width, X experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from ultramem_ds.config.schema import Architecture, MemoryConfig


@dataclass(frozen=True, kw_only=True)
class Count:
    """Predicted size of one model, plain numbers."""

    dense_params: int  # attention, MLPs, gates, queries, keys, cores, projections
    sparse_params: int  # value tables, or experts for kind=moe
    activated_params: int  # matrix parameters that one token multiplies
    norm_params: int  # one-dimensional norm weights, in no other field

    @property
    def params(self) -> int:
        """Dense and sparse parameters, without embedding, head and norm weights."""
        return self.dense_params + self.sparse_params

    @property
    def flops_per_token(self) -> int:
        """Forward FLOPs of one token: 2 * activated matrix parameters."""
        return 2 * self.activated_params


def query_width(memory: MemoryConfig) -> int:
    """Output width of the query projection, by layout (DESIGN 3.2)."""
    per_layout = {
        "shared": 2,
        "per-head": 2 * memory.num_heads,
        "per-head-shared-sides": memory.num_heads * memory.tucker_rank,
    }
    return per_layout[memory.query] * memory.kdim


def _memory_layer(memory: MemoryConfig, hidden: int) -> Count:
    """One memory layer: query, convolution, keys, cores, value projection; its table is sparse."""
    query = hidden * query_width(memory)
    conv = hidden * memory.query_conv
    keys = memory.num_heads * 2 * memory.num_keys * memory.kdim * memory.tucker_rank
    tucker = memory.retrieval == "tdqkr"
    cores = tucker * memory.num_cores * memory.num_heads * memory.tucker_rank**2
    projection = memory.value_proj * memory.expansion * memory.value_dim * hidden
    dense = query + conv + keys + cores + projection
    return Count(
        dense_params=dense,
        sparse_params=memory.num_rows * memory.value_dim,
        activated_params=dense,
        norm_params=0 if memory.qk_norm == "none" else 2 * memory.kdim,
    )


def _block(config: Architecture) -> Count:
    """One transformer block: attention 4 D^2, and an MLP of 2 D inner or a mixture of experts."""
    hidden, inner = config.model.hidden_size, config.model.inner_size
    attention = 4 * hidden * hidden
    mlp = 2 * hidden * inner
    norms = 2 * hidden
    if config.model.kind == "moe":
        gate = hidden * config.moe.num_experts
        return Count(
            dense_params=attention + gate,
            sparse_params=config.moe.num_experts * mlp,
            activated_params=attention + gate + config.moe.top_k * mlp,
            norm_params=norms,
        )
    dense = attention + mlp
    return Count(dense_params=dense, sparse_params=0, activated_params=dense, norm_params=norms)


def count(config: Architecture) -> Count:
    """Predict the size of the model that ``config`` describes.

    Args:
        config: A full configuration.

    Returns:
        Parameter counts and activated parameters of the whole model.
    """
    parts = [_block(config)] * config.model.num_layers
    if config.has_memory:
        layer = _memory_layer(config.memory, config.model.hidden_size)
        parts += [layer] * len(config.memory.spans)
    final_norm = config.model.hidden_size
    return Count(
        dense_params=sum(part.dense_params for part in parts),
        sparse_params=sum(part.sparse_params for part in parts),
        activated_params=sum(part.activated_params for part in parts),
        norm_params=sum(part.norm_params for part in parts) + final_norm,
    )


def training_flops_per_token(config: Architecture) -> int:
    """Model FLOPs of one token's forward and backward, what utilisation is measured by.

    3 * (2 * activated matrix parameters + 2 D vocab for the head + 2 L S D for causal attention,
    whose scores and sums see S/2 positions on average + 2 K V per memory layer for weighting and
    pooling rows). Recomputation, padding and the optimizer do not count.
    """
    model = config.model
    forward = count(config).flops_per_token
    forward += 2 * model.hidden_size * model.vocab_size
    forward += 2 * model.num_layers * model.seq_len * model.hidden_size
    if config.has_memory:
        memory = config.memory
        forward += 2 * len(memory.spans) * memory.rows_per_token * memory.value_dim
    return 3 * forward
