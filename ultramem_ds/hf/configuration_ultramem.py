"""Configuration of an exported model: one flat object for all four kinds (docs/export.md)."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any

from transformers import PreTrainedConfig

from ultramem_ds.exchange.architecture import FORMAT_VERSION, MODEL_TYPE

KINDS = ("dense", "pkm", "moe", "ultramem")


class UltraMemConfig(PreTrainedConfig):
    """Dense, PKM, MoE and UltraMem decoders.

    Letters: D hidden, A attention heads, F inner width, H memory heads, r Tucker rank, h cores, m
    top-m, n keys per side, E expansion, N physical rows, V value width, k convolution taps.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ("past_key_values",)
    # The packed projection and the memory have no tensor-parallel plan: refused, not replicated.
    base_model_tp_plan = None
    base_model_pp_plan = None
    base_model_fsdp_plan = {  # noqa: RUF012 - not a field
        "embedding": "free_full_weight",
        "blocks.*": "free_full_weight",
        "memories.*": "free_full_weight",
        "final_norm": "keep_full_weight",
    }

    format_version: int = FORMAT_VERSION
    kind: str = "dense"
    vocab_size: int = 50_432  # rows of embedding and head, padding included
    tokenizer_vocab_size: int | None = None  # entries of the tokenizer; None = vocab_size
    hidden_size: int = 1024  # D
    intermediate_size: int = 4096  # F, of one expert for kind=moe
    num_hidden_layers: int = 12
    num_attention_heads: int = 16  # A
    num_key_value_heads: int | None = None
    head_dim: int = 0  # A heads of D / A
    hidden_act: str = "gelu"
    norm_type: str = "layernorm"  # or rmsnorm; weight only
    norm_eps: float = 1e-5
    max_position_embeddings: int = 2048  # tokens
    rope_parameters: dict[str, Any] = field(default_factory=dict)
    dropout: float = 0.0  # of embedding and residual outputs
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    embedding_initializer_range: float = 1.0
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    layer_types: list[str] | None = None
    number_of_conv_states: int = 1  # convolution states of one block's cache

    num_experts: int = 0
    num_experts_per_tok: int = 0
    router_aux_loss_coef: float = 0.0  # weight of the balance loss in training

    memory_spans: list[list[int]] = field(default_factory=list)  # [a, b], blocks counted from 1
    memory_knum: int = 0  # N = knum^2
    memory_kdim: int = 0
    memory_value_dim: int = 0  # V
    memory_top_m: int = 0  # m
    memory_num_heads: int = 0  # H
    memory_tucker_rank: int = 1  # r
    memory_num_cores: int = 1  # h
    memory_expansion: int = 0  # E
    memory_retrieval: str = "tdqkr"  # tdqkr or product-key
    memory_candidates: str = "one-sided"
    memory_query: str = "shared"  # layout of the queries
    memory_query_conv: int = 0  # k; 0 = none
    memory_qk_norm: str = "none"
    memory_softmax: bool = False
    memory_value_proj: bool = False
    memory_shuffle: str = "none"
    memory_aux_loss_weight: float = 0.0
    memory_aux_loss_margin: float = 0.0
    memory_table_parts: int = 1  # tensors that a stored table is cut into
    memory_device: str | None = None  # where tables live if not with the rest

    def __post_init__(self, **kwargs: Any) -> None:
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"config.json has format_version {self.format_version}, this program reads up to "
                f"{FORMAT_VERSION}: update ultramem_ds, or export again with this version"
            )
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is none of {', '.join(KINDS)}")
        if self.hidden_act != "gelu":
            raise ValueError(f"hidden_act={self.hidden_act!r}: these models have gelu")
        self.tokenizer_vocab_size = self.tokenizer_vocab_size or self.vocab_size
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads != self.num_attention_heads:
            raise ValueError("num_key_value_heads must equal num_attention_heads")
        self.rope_parameters = self.rope_parameters or {
            "rope_type": "default",
            "rope_theta": 10_000.0,
        }
        if self.rope_parameters.get("rope_type", "default") != "default":
            raise ValueError(f"rope_parameters={self.rope_parameters}: rope_type must be default")
        self.memory_spans = [list(span) for span in self.memory_spans]
        if bool(self.memory_spans) != (self.kind in ("pkm", "ultramem")):
            raise ValueError(f"kind={self.kind} with memory_spans={self.memory_spans}")
        starts = [a for a, _ in self.memory_spans]
        if self.layer_types is None:
            # The state of a query convolution is cached with the keys of the block it starts at.
            hybrid = set(starts) if self.memory_query_conv > 1 else set()
            self.layer_types = [
                "hybrid" if block in hybrid else "full_attention"
                for block in range(1, self.num_hidden_layers + 1)
            ]
            self.number_of_conv_states = max((starts.count(a) for a in hybrid), default=1)
        super().__post_init__(**kwargs)

    @property
    def memory_num_keys(self) -> int:
        """Keys per side, n = sqrt(E) knum."""
        return math.isqrt(self.memory_expansion) * self.memory_knum

    @property
    def memory_num_rows(self) -> int:
        """Physical rows of one table, N = knum^2."""
        return self.memory_knum**2
