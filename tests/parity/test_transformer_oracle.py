"""The dense transformer against NumPy in fp64, written from the papers and not from the model.

Rotary embedding (Su et al., 2024) is a rotation of complex numbers, attention a loop over queries,
GELU the Gaussian's distribution function: a wrong sign, half, scale or mask shows in the logits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ultramem_ds.config.load import load_config
from ultramem_ds.model.init import init_module
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.model.transformer import rotary_tables, rotate

# S tokens, D hidden, A heads, K head width, W vocabulary.
Array = NDArray[np.float64]
SIZES = [
    "model.hidden_size=24",
    "model.inner_size=40",
    "model.num_layers=2",
    "model.num_heads=3",
    "model.vocab_size=31",
    "model.seq_len=19",
]
# Angles are fp32 in the model: position 18 times 2^-24 is 1e-6, and two blocks carry it on.
TOLERANCE = dict(rtol=2e-5, atol=2e-6)

gelu = np.vectorize(lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))))


def rotated(x_SK: Array, theta: float) -> Array:
    """Components i and i + K/2 as one complex number, turned by position * theta^(-2i/K)."""
    S, K = x_SK.shape
    turn_Sk = np.outer(np.arange(S), theta ** (-2 * np.arange(K // 2) / K))
    z_Sk = (x_SK[:, : K // 2] + 1j * x_SK[:, K // 2 :]) * np.exp(1j * turn_Sk)
    return np.concatenate([z_Sk.real, z_Sk.imag], axis=1)


def attended(q_SK: Array, k_SK: Array, v_SK: Array) -> Array:
    """Every query over the keys up to its own position."""
    out = []
    for position, q_K in enumerate(q_SK):
        weights = np.exp(k_SK[: position + 1] @ q_K / math.sqrt(len(q_K)))
        out.append(weights @ v_SK[: position + 1] / weights.sum())
    return np.stack(out)


def normed(x_SD: Array, weight_D: Array, kind: str, eps: float) -> Array:
    """LayerNorm without a bias, or RMSNorm."""
    if kind == "layernorm":
        x_SD = x_SD - x_SD.mean(-1, keepdims=True)
    return x_SD / np.sqrt((x_SD**2).mean(-1, keepdims=True) + eps) * weight_D


def logits(tokens_S: NDArray[np.int64], model: LanguageModel) -> Array:
    """Of the whole model: pre-norm blocks, final norm, head."""
    p = {name: value.detach().double().numpy() for name, value in model.named_parameters()}
    config = model.config.model
    norm: dict[str, Any] = dict(kind=config.norm, eps=config.norm_eps)
    x_SD = p["embedding.weight"][tokens_S]
    for block in (f"blocks.{i}." for i in range(config.num_layers)):
        y_SD = normed(x_SD, p[block + "attention_norm.weight"], **norm)
        qkv = (y_SD @ p[block + "attention.qkv_proj.weight"].T).reshape(len(y_SD), 3, -1)
        heads = []
        for head in range(config.num_heads):
            at = slice(head * config.head_dim, (head + 1) * config.head_dim)
            q_SK, k_SK = (rotated(qkv[:, i, at], config.rope_theta) for i in (0, 1))
            heads.append(attended(q_SK, k_SK, qkv[:, 2, at]))
        x_SD = x_SD + np.concatenate(heads, axis=1) @ p[block + "attention.out_proj.weight"].T
        y_SD = normed(x_SD, p[block + "mlp_norm.weight"], **norm)
        inner = gelu(y_SD @ p[block + "mlp.up_proj.weight"].T)
        x_SD = x_SD + inner @ p[block + "mlp.down_proj.weight"].T
    return normed(x_SD, p["final_norm.weight"], **norm) @ p["head.weight"].T


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_logits_and_loss_are_those_of_the_papers(norm: str) -> None:
    config = load_config("dense-debug", [*SIZES, f"model.norm={norm}", "model.rope_theta=50"])
    model = LanguageModel(config)
    init_module(model, config, seed=0)
    with torch.no_grad():  # norms start at one, which hides them
        for name, param in model.named_parameters():
            if "norm" in name:
                param.uniform_(0.5, 1.5)
    model = model.double().eval()
    tokens_S1 = np.random.default_rng(0).integers(31, size=20)
    expected_SW = logits(tokens_S1[:-1], model)
    tokens_BS1 = torch.from_numpy(tokens_S1)[None]
    found_BSW = model.logits(tokens_BS1[:, :-1])
    torch.testing.assert_close(found_BSW[0].detach(), torch.from_numpy(expected_SW), **TOLERANCE)
    chosen_S = expected_SW[np.arange(19), tokens_S1[1:]]
    loss = (np.log(np.exp(expected_SW).sum(-1)) - chosen_S).mean()
    assert float(model(tokens_BS1)["loss"]) == pytest.approx(loss, rel=1e-5)


def test_rotation_is_that_of_transformers_llama() -> None:
    """A second oracle for the convention: which components make a pair, and which way they turn."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    settings = dict(hidden_size=64, num_attention_heads=4, max_position_embeddings=64)
    config = llama.LlamaConfig(**settings)
    x_BASK = torch.randn(2, 4, 33, 16, generator=torch.Generator().manual_seed(0))
    positions_BS = torch.arange(33)[None]
    cos, sin = llama.LlamaRotaryEmbedding(config)(x_BASK, positions_BS)
    expected, _ = llama.apply_rotary_pos_emb(x_BASK, x_BASK, cos, sin)
    turned = rotate(x_BASK, *rotary_tables(positions_BS, 16, 10_000.0, torch.float32))
    torch.testing.assert_close(turned, expected, rtol=1e-6, atol=1e-6)
