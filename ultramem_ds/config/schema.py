"""Typed configuration: one frozen dataclass per concern, bad values rejected at construction.

Every field is a key that ``section.key=value`` overrides on the command line. Letters in
comments: D hidden, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from ultramem_ds.config.memory import MemoryConfig
from ultramem_ds.config.validation import STRICT, require

Kind: TypeAlias = Literal["dense", "pkm", "moe", "ultramem"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The transformer that every kind shares (paper section 5.1, Table 6)."""

    __pydantic_config__ = STRICT

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
            require(
                getattr(self, name) >= 1, f"model.{name}={getattr(self, name)} must be at least 1"
            )
        require(
            self.hidden_size % self.num_heads == 0,
            f"model.hidden_size={self.hidden_size} must be divisible by "
            f"model.num_heads={self.num_heads}",
        )
        require(self.head_dim % 2 == 0, "model.hidden_size / num_heads must be even for rotary")
        require(0.0 <= self.dropout < 1.0, f"model.dropout={self.dropout} must be in [0, 1)")
        require(self.norm_eps > 0, f"model.norm_eps={self.norm_eps} must be positive")
        require(self.rope_theta > 0, f"model.rope_theta={self.rope_theta} must be positive")
        require(self.init_std > 0, f"model.init_std={self.init_std} must be positive")
        require(
            self.embedding_std > 0, f"model.embedding_std={self.embedding_std} must be positive"
        )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Mixture-of-experts baseline on ``deepspeed.moe.layer.MoE`` (paper section 5.1)."""

    __pydantic_config__ = STRICT

    num_experts: int = 32
    top_k: int = 2  # experts per token
    balance_loss_weight: float = 0.01  # weight of the load-balance loss (Fedus et al., 2022)
    expert_parallel_size: int = 0  # ranks that share one set of experts; 0 = fewest on a rank
    drop_tokens: bool = False  # drop tokens over capacity (DeepSpeed's own default is true)
    capacity_factor: float = 1.0  # only with drop_tokens
    use_rts: bool = False  # random token selection, only with drop_tokens
    top2_2nd_expert_sampling: bool = False  # Gumbel noise on the second expert's choice

    def __post_init__(self) -> None:
        require(self.top_k in (1, 2), f"moe.top_k={self.top_k} must be 1 or 2")
        require(
            self.num_experts >= self.top_k,
            f"moe.num_experts={self.num_experts} must be at least moe.top_k",
        )
        require(
            self.balance_loss_weight >= 0,
            f"moe.balance_loss_weight={self.balance_loss_weight} must not be negative",
        )
        require(
            self.expert_parallel_size >= 0,
            f"moe.expert_parallel_size={self.expert_parallel_size} must be 0 or positive",
        )
        require(
            self.capacity_factor > 0, f"moe.capacity_factor={self.capacity_factor} must be positive"
        )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedules (paper Table 4, section 3.2 and 5.1)."""

    __pydantic_config__ = STRICT

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
    value_weight_decay: float | None = None  # on tables; null = weight_decay
    key_lr_multiplier: float = 1.0  # of the memory layers' keys, times the dense rate
    query_lr_multiplier: float = 1.0  # of their queries' projection and convolution, likewise
    gain_lr_multiplier: float = 1.0  # of the norms on queries and keys, times the dense rate

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optim.lr={self.lr} must be positive")
        require(
            0 <= self.lr_end_ratio <= 1, f"optim.lr_end_ratio={self.lr_end_ratio} must be in [0, 1]"
        )
        require(
            0 <= self.warmup_ratio < 1, f"optim.warmup_ratio={self.warmup_ratio} must be in [0, 1)"
        )
        require(0 <= self.beta1 < 1 and 0 <= self.beta2 < 1, "optim.beta1/beta2 must be in [0, 1)")
        require(self.eps > 0, f"optim.eps={self.eps} must be positive")
        require(
            self.weight_decay >= 0, f"optim.weight_decay={self.weight_decay} must not be negative"
        )
        require(
            self.clip_grad >= 0, f"optim.clip_grad={self.clip_grad} must be 0 (off) or positive"
        )
        require(
            self.value_lr_multiplier > 0,
            f"optim.value_lr_multiplier={self.value_lr_multiplier} must be positive",
        )
        require(self.value_lr > 0, f"optim.value_lr={self.value_lr} must be positive")
        require(
            self.table_weight_decay >= 0,
            f"optim.value_weight_decay={self.value_weight_decay} must not be negative",
        )
        require(
            self.key_lr_multiplier > 0,
            f"optim.key_lr_multiplier={self.key_lr_multiplier} must be positive",
        )
        require(
            self.query_lr_multiplier > 0,
            f"optim.query_lr_multiplier={self.query_lr_multiplier} must be positive",
        )
        require(
            self.gain_lr_multiplier > 0,
            f"optim.gain_lr_multiplier={self.gain_lr_multiplier} must be positive",
        )

    @property
    def table_weight_decay(self) -> float:
        """Weight decay of value tables."""
        return self.weight_decay if self.value_weight_decay is None else self.value_weight_decay


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch, precision and housekeeping of one run."""

    __pydantic_config__ = STRICT

    seed: int = 0
    global_batch_size: int = 2048  # sequences per optimizer step, all ranks together
    micro_batch_size: int | Literal["auto"] = "auto"  # sequences per rank and forward
    max_steps: int = 238_418  # optimizer steps of the schedule
    precision: Literal["fp32", "bf16"] = "bf16"
    activation_checkpointing: bool = False  # recompute blocks in backward, never the lookups
    compile: bool = False  # torch.compile the blocks, not what is between them
    log_every: int = 10  # optimizer steps between console lines
    eval_every: int = 1000  # optimizer steps between validations; 0 = only at the end
    eval_sequences: int = 512  # sequences per validation subset; 0 = all
    tasks: str = ""  # benchmark tasks in the loop, as of `evaluate --tasks`; empty = none
    tasks_every: int = 5000  # optimizer steps between them; 0 = only at the end
    tasks_limit: int = 100  # items of each task; 0 = all
    task_data: str = ""  # directory of their data, as of `evaluate --task-data`; empty = download
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
        require(self.seed >= 0, f"train.seed={self.seed} must not be negative")
        for name in ("global_batch_size", "max_steps", "log_every"):
            require(
                getattr(self, name) >= 1, f"train.{name}={getattr(self, name)} must be at least 1"
            )
        for name in (
            "eval_every",
            "eval_sequences",
            "tasks_every",
            "tasks_limit",
            "save_every",
            "keep_last",
            "keep_every",
            "stop_at_step",
        ):
            require(
                getattr(self, name) >= 0, f"train.{name}={getattr(self, name)} must not be negative"
            )
        for name in ("max_bad_steps", "watchdog_s", "desync_every"):
            require(
                getattr(self, name) >= 0, f"train.{name}={getattr(self, name)} must not be negative"
            )
        require(
            self.grad_spike_sigma > 0,
            f"train.grad_spike_sigma={self.grad_spike_sigma} must be positive",
        )
        require(
            self.max_bad_steps <= 128,
            f"train.max_bad_steps={self.max_bad_steps} must be at most 128, the steps remembered",
        )
        if self.rollback:
            require(self.max_bad_steps > 0, "train.rollback=true needs train.max_bad_steps above 0")
        if self.micro_batch_size != "auto":
            require(
                self.micro_batch_size >= 1,
                f"train.micro_batch_size={self.micro_batch_size} must be auto or positive",
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The mixture loader (docs/data.md)."""

    __pydantic_config__ = STRICT

    weights: dict[str, float] = field(
        default_factory=dict
    )  # per subset; {} = RedPajama's, else by tokens
    num_workers: int = 1  # prefetching processes per rank; 0 = load in the training process
    prefetch: int = 4  # micro-batches each worker keeps ready
    document_mask: bool = False  # attention and convolution stop at document boundaries
    reset_positions: bool = False  # rotary positions restart at every document

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            require(weight >= 0, f"data.weights.{name} must not be negative")
        require(self.num_workers >= 0, f"data.num_workers={self.num_workers} must not be negative")
        require(self.prefetch >= 1, f"data.prefetch={self.prefetch} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a model is: the sections that models, their initialisation and accounting read."""

    __pydantic_config__ = STRICT

    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)

    def __post_init__(self) -> None:
        if not self.has_memory:
            return
        last = max(b for _, b in self.memory.spans)
        require(
            last <= self.model.num_layers,
            f"memory.placement={self.memory.placement} reaches block {last} but "
            f"model.num_layers={self.model.num_layers}",
        )
        if not self.memory.value_proj:
            require(
                self.memory.value_dim == self.model.hidden_size,
                f"memory.value_proj=false needs memory.value_dim={self.memory.value_dim} to equal "
                f"model.hidden_size={self.model.hidden_size}",
            )

    @property
    def has_memory(self) -> bool:
        """Whether the model owns value tables."""
        return self.model.kind in ("pkm", "ultramem")


@dataclass(frozen=True, kw_only=True)
class Config(Architecture):
    """Everything a run depends on, but for the DeepSpeed JSON and the paths."""

    __pydantic_config__ = STRICT

    preset: str
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
