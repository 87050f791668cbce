"""Typed configuration: one frozen dataclass per concern, bad values rejected at construction.

Every field is a key that ``section.key=value`` overrides on the command line. Letters in
comments: D hidden, L layers, H memory heads, r Tucker rank, h cores, m top-m, n keys per side,
E expansion, N physical rows, V value width (paper sections 3 and E).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from pydantic import ConfigDict

Kind: TypeAlias = Literal["dense", "pkm", "moe", "ultramem"]
Partition: TypeAlias = Literal["auto", "number-wise", "dimension-wise", "owner-pooled"]
Candidates: TypeAlias = Literal["one-sided", "two-sided", "two-sided-full"]

# Unknown keys, NaN and infinity are errors wherever pydantic validates one of these dataclasses.
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The transformer that every kind shares (paper section 5.1, Table 6)."""

    __pydantic_config__ = _STRICT

    kind: Kind = "dense"
    hidden_size: int = 1024  # D
    inner_size: int = 4096  # inner width of the MLP; of one expert for kind=moe
    num_layers: int = 12  # L
    num_heads: int = 16  # attention heads
    vocab_size: int = 50_432  # rows of embedding and head, padding included
    seq_len: int = 2048  # tokens per training sequence
    dropout: float = 0.1  # on embedding, attention and residual outputs
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"  # pre-norms and the final norm, no bias
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    init_std: float = 0.02  # of matrices; residual outputs / sqrt(2 L)
    embedding_std: float = 1.0  # residual stream of unit scale, as branch variances 1/(2L) suppose

    def __post_init__(self) -> None:
        for name in (
            "hidden_size",
            "inner_size",
            "num_layers",
            "num_heads",
            "vocab_size",
            "seq_len",
        ):
            _require(
                getattr(self, name) >= 1, f"model.{name}={getattr(self, name)} must be at least 1"
            )
        _require(
            self.hidden_size % self.num_heads == 0,
            f"model.hidden_size={self.hidden_size} must be divisible by "
            f"model.num_heads={self.num_heads}",
        )
        _require(self.head_dim % 2 == 0, "model.hidden_size / num_heads must be even for rotary")
        _require(0.0 <= self.dropout < 1.0, f"model.dropout={self.dropout} must be in [0, 1)")
        _require(self.norm_eps > 0, f"model.norm_eps={self.norm_eps} must be positive")
        _require(self.rope_theta > 0, f"model.rope_theta={self.rope_theta} must be positive")
        _require(self.init_std > 0, f"model.init_std={self.init_std} must be positive")
        _require(
            self.embedding_std > 0, f"model.embedding_std={self.embedding_std} must be positive"
        )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Memory layers of kinds ``ultramem`` and ``pkm`` (paper section 3, Tables 2, 5 and 6)."""

    __pydantic_config__ = _STRICT

    placement: str = "3:5/6:8/9:11"  # a:b pairs, 1-based: input from block a, added after block b
    knum: int = 1000  # N = knum^2 physical rows
    kdim: int = 256  # width of a query / key (per rank under per-head-shared-sides)
    value_dim: int = 512  # V
    top_m: int = 16  # m, selected slots per head
    num_heads: int = 2  # H
    retrieval: Literal["product-key", "tdqkr"] = "tdqkr"
    tucker_rank: int = 2  # r (1 for product-key)
    num_cores: int = 2  # h, multi-core scoring (1 for product-key)
    expansion: int = 4  # E, a perfect square
    candidates: Candidates = "one-sided"  # how TDQKR's rank-1 search picks m candidates per side
    query: Literal["shared", "per-head", "per-head-shared-sides"] = "shared"
    query_conv: int = 4  # kernel of the causal depthwise convolution; 0 = none
    qk_norm: Literal["none", "layernorm", "rmsnorm"] = "layernorm"  # on query and keys, over kdim
    softmax: bool = False  # softmax over the selected scores of a head (PKM)
    value_proj: bool = True  # project V -> D after pooling; without it V = D and E = 1
    shuffle: Literal["bijection", "stored", "none"] = "bijection"  # virtual slot permutation
    init: Literal["pkm", "paper", "corrected"] = "paper"  # initialisation recipe (model/init.py)
    aux_loss_weight: float = 0.001  # alpha of eq. 12
    aux_loss_margin: float = 0.15  # tau of eq. 12
    partition: Partition = "auto"  # how tables are sharded over ranks
    shard_group_size: int = 0  # ranks that share one copy of the tables; 0 = all
    dedup: bool = False  # number-wise: ship each distinct row once per rank and step
    wire_dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of what travels; auto = the table's
    # What decides partition=auto: GB/s a rank sends and GB/s of random row reads; auto = measured
    wire_gb_per_s: float | Literal["auto"] = "auto"
    memory_gb_per_s: float | Literal["auto"] = "auto"
    rates_file: str = ""  # take both from what `bench comm --json` printed into this file
    async_lookup: bool = False  # overlap lookups with the blocks between a and b
    kernel: str = "auto"  # lookup_reduce implementation; auto = fastest available
    compile: bool = False  # torch.compile what scores pairs, where no native call does
    # Adam over the shard, over touched rows, or over touched rows with skipped steps made up for
    table_optimizer: Literal["dense", "row-sparse", "row-sparse-catch-up"] = "dense"
    stats_every: int = 50  # optimizer steps between training-state statistics; 0 = never

    def __post_init__(self) -> None:
        for name in ("knum", "kdim", "value_dim", "top_m", "num_heads", "tucker_rank", "num_cores"):
            _require(
                getattr(self, name) >= 1, f"memory.{name}={getattr(self, name)} must be at least 1"
            )
        root = math.isqrt(self.expansion) if self.expansion >= 1 else 0
        _require(
            root >= 1 and root * root == self.expansion,
            f"memory.expansion={self.expansion} must be a perfect square (1, 4, 9, 16, ...)",
        )
        _require(
            self.top_m <= self.num_keys,
            f"memory.top_m={self.top_m} exceeds the {self.num_keys} keys per side",
        )
        _require(
            self.value_dim % self.num_cores == 0,
            f"memory.value_dim={self.value_dim} must be divisible by "
            f"memory.num_cores={self.num_cores}",
        )
        if self.retrieval == "product-key":
            _require(
                self.tucker_rank == 1 and self.num_cores == 1,
                "memory.retrieval=product-key needs memory.tucker_rank=1 and memory.num_cores=1",
            )
            _require(
                self.candidates == "one-sided",
                "memory.retrieval=product-key is exact: memory.candidates must stay one-sided",
            )
        if not self.value_proj:
            _require(self.expansion == 1, "memory.value_proj=false needs memory.expansion=1")
        if self.candidates == "two-sided":
            _require(self.top_m % 2 == 0, "memory.candidates=two-sided needs an even memory.top_m")
        _require(not (self.softmax and self.num_cores > 1), "memory.softmax needs num_cores=1")
        _require(
            self.query_conv >= 0,
            f"memory.query_conv={self.query_conv} must be 0 (none) or a kernel size",
        )
        _require(
            self.aux_loss_weight >= 0,
            f"memory.aux_loss_weight={self.aux_loss_weight} must not be negative",
        )
        _require(
            self.aux_loss_margin >= 0,
            f"memory.aux_loss_margin={self.aux_loss_margin} must not be negative",
        )
        _require(
            self.shard_group_size >= 0,
            f"memory.shard_group_size={self.shard_group_size} must be 0 (all) or positive",
        )
        for name in ("wire_gb_per_s", "memory_gb_per_s"):
            rate = getattr(self, name)
            _require(
                rate == "auto" or rate > 0, f"memory.{name}={rate} must be auto or positive"
            )
        _require(
            self.stats_every >= 0,
            f"memory.stats_every={self.stats_every} must be 0 (never) or positive",
        )
        _require(len(self.spans) >= 1, "memory.placement names no memory layer")

    @property
    def num_keys(self) -> int:
        """N = sqrt(E) * knum, keys per side."""
        return math.isqrt(self.expansion) * self.knum

    @property
    def num_rows(self) -> int:
        """N = knum^2, physical rows of one table."""
        return self.knum * self.knum

    @property
    def num_slots(self) -> int:
        """E * N = n^2, virtual slots of one table."""
        return self.expansion * self.num_rows

    @property
    def rows_per_token(self) -> int:
        """K = m * H, looked-up rows per token."""
        return self.top_m * self.num_heads

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """``placement`` parsed: 1-based (a, b) with a <= b, in order."""
        spans = []
        for part in self.placement.split("/"):
            begin, sep, end = part.partition(":")
            ok = sep and begin.strip().isdigit() and end.strip().isdigit()
            _require(bool(ok), f"memory.placement={self.placement!r}: {part!r} is not a:b")
            a, b = int(begin), int(end)
            _require(1 <= a <= b, f"memory.placement: {part!r} needs 1 <= a <= b")
            spans.append((a, b))
        return tuple(spans)


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Mixture-of-experts baseline on ``deepspeed.moe.layer.MoE`` (paper section 5.1)."""

    __pydantic_config__ = _STRICT

    num_experts: int = 32
    top_k: int = 2  # experts per token
    balance_loss_weight: float = 0.01  # weight of the load-balance loss (Fedus et al., 2022)
    expert_parallel_size: int = 0  # ranks that share one set of experts; 0 = fewest on a rank
    drop_tokens: bool = False  # drop tokens over capacity (DeepSpeed's own default is true)
    capacity_factor: float = 1.0  # only with drop_tokens
    use_rts: bool = False  # random token selection, only with drop_tokens
    top2_2nd_expert_sampling: bool = False  # Gumbel noise on the second expert's choice

    def __post_init__(self) -> None:
        _require(self.top_k in (1, 2), f"moe.top_k={self.top_k} must be 1 or 2")
        _require(
            self.num_experts >= self.top_k,
            f"moe.num_experts={self.num_experts} must be at least moe.top_k",
        )
        _require(
            self.balance_loss_weight >= 0,
            f"moe.balance_loss_weight={self.balance_loss_weight} must not be negative",
        )
        _require(
            self.expert_parallel_size >= 0,
            f"moe.expert_parallel_size={self.expert_parallel_size} must be 0 or positive",
        )
        _require(
            self.capacity_factor > 0, f"moe.capacity_factor={self.capacity_factor} must be positive"
        )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedules (paper Table 4, section 3.2 and 5.1)."""

    __pydantic_config__ = _STRICT

    lr: float = 6e-4  # peak learning rate
    lr_end_ratio: float = 0.1  # cosine end / peak
    warmup_ratio: float = 0.01  # share of max_steps spent in linear warm-up
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices and tables
    decay_norms: bool = False  # weight decay on norm weights too
    clip_grad: float = 1.0  # global gradient norm; 0 = no clipping
    value_lr_schedule: Literal["decay", "constant"] = "decay"  # of value tables
    value_lr_multiplier: float = 10.0  # decay: LR(t) = LR_dense(t) (1 + (x - 1)(1 - t/T))
    value_lr: float = 1e-3  # constant: the tables' learning rate (Lample et al., 2019)

    def __post_init__(self) -> None:
        _require(self.lr > 0, f"optim.lr={self.lr} must be positive")
        _require(
            0 <= self.lr_end_ratio <= 1, f"optim.lr_end_ratio={self.lr_end_ratio} must be in [0, 1]"
        )
        _require(
            0 <= self.warmup_ratio < 1, f"optim.warmup_ratio={self.warmup_ratio} must be in [0, 1)"
        )
        _require(0 <= self.beta1 < 1 and 0 <= self.beta2 < 1, "optim.beta1/beta2 must be in [0, 1)")
        _require(self.eps > 0, f"optim.eps={self.eps} must be positive")
        _require(
            self.weight_decay >= 0, f"optim.weight_decay={self.weight_decay} must not be negative"
        )
        _require(
            self.clip_grad >= 0, f"optim.clip_grad={self.clip_grad} must be 0 (off) or positive"
        )
        _require(
            self.value_lr_multiplier > 0,
            f"optim.value_lr_multiplier={self.value_lr_multiplier} must be positive",
        )
        _require(self.value_lr > 0, f"optim.value_lr={self.value_lr} must be positive")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch, precision and housekeeping of one run."""

    __pydantic_config__ = _STRICT

    seed: int = 0
    global_batch_size: int = 2048  # sequences per optimizer step, all ranks together
    micro_batch_size: int | Literal["auto"] = "auto"  # sequences per rank and forward
    max_steps: int = 238_418  # optimizer steps of the schedule
    precision: Literal["fp32", "bf16"] = "bf16"
    activation_checkpointing: bool = False  # recompute blocks in backward, never the lookups
    log_every: int = 10  # optimizer steps between console lines
    eval_every: int = 1000  # optimizer steps between validations; 0 = only at the end
    eval_sequences: int = 512  # sequences per validation subset; 0 = all
    save_every: int = 1000  # optimizer steps between checkpoints; 0 = only at the end
    keep_last: int = 2  # checkpoints kept; 0 = all
    keep_every: int = 0  # checkpoints of steps divisible by this are kept for ever; 0 = none
    background_save: bool = False  # train on while files are written, for one more copy in memory
    stop_at_step: int = 0  # save and exit at this step; the schedule stays; 0 = run to max_steps
    max_bad_steps: int = 10  # stop after so many skipped steps in a row; 0 = never
    grad_spike: Literal["off", "skip", "clip"] = "off"  # what to do about a gradient norm spike
    grad_spike_sigma: float = 6.0  # standard deviations above the recent mean that make a spike
    rollback: bool = False  # instead of stopping, reload the last checkpoint and skip the bad data
    watchdog_s: float = 600.0  # seconds without progress that end the run; 0 = no watchdog
    desync_every: int = 100  # optimizer steps between comparisons of the ranks; 0 = at start only

    def __post_init__(self) -> None:
        _require(self.seed >= 0, f"train.seed={self.seed} must not be negative")
        for name in ("global_batch_size", "max_steps", "log_every"):
            _require(
                getattr(self, name) >= 1, f"train.{name}={getattr(self, name)} must be at least 1"
            )
        for name in (
            "eval_every",
            "eval_sequences",
            "save_every",
            "keep_last",
            "keep_every",
            "stop_at_step",
        ):
            _require(
                getattr(self, name) >= 0, f"train.{name}={getattr(self, name)} must not be negative"
            )
        for name in ("max_bad_steps", "watchdog_s", "desync_every"):
            _require(
                getattr(self, name) >= 0, f"train.{name}={getattr(self, name)} must not be negative"
            )
        _require(
            self.grad_spike_sigma > 0,
            f"train.grad_spike_sigma={self.grad_spike_sigma} must be positive",
        )
        _require(
            self.max_bad_steps <= 128,
            f"train.max_bad_steps={self.max_bad_steps} must be at most 128, the steps remembered",
        )
        if self.rollback:
            _require(
                self.max_bad_steps > 0, "train.rollback=true needs train.max_bad_steps above 0"
            )
        if self.micro_batch_size != "auto":
            _require(
                self.micro_batch_size >= 1,
                f"train.micro_batch_size={self.micro_batch_size} must be auto or positive",
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The mixture loader (docs/data.md)."""

    __pydantic_config__ = _STRICT

    weights: dict[str, float] = field(
        default_factory=dict
    )  # per subset; {} = RedPajama's, else by tokens
    num_workers: int = 1  # prefetching processes per rank; 0 = load in the training process
    prefetch: int = 4  # micro-batches each worker keeps ready
    document_mask: bool = False  # attention and convolution stop at document boundaries
    reset_positions: bool = False  # rotary positions restart at every document

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            _require(weight >= 0, f"data.weights.{name} must not be negative")
        _require(self.num_workers >= 0, f"data.num_workers={self.num_workers} must not be negative")
        _require(self.prefetch >= 1, f"data.prefetch={self.prefetch} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run depends on, but for the DeepSpeed JSON and the paths."""

    __pydantic_config__ = _STRICT

    preset: str
    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        if not self.has_memory:
            return
        last = max(b for _, b in self.memory.spans)
        _require(
            last <= self.model.num_layers,
            f"memory.placement={self.memory.placement} reaches block {last} but "
            f"model.num_layers={self.model.num_layers}",
        )
        if not self.memory.value_proj:
            _require(
                self.memory.value_dim == self.model.hidden_size,
                f"memory.value_proj=false needs memory.value_dim={self.memory.value_dim} to equal "
                f"model.hidden_size={self.model.hidden_size}",
            )

    @property
    def has_memory(self) -> bool:
        """Whether the model owns value tables."""
        return self.model.kind in ("pkm", "ultramem")
