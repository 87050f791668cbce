"""Section ``memory`` of the configuration.

Letters in comments: D hidden, L layers, H memory heads, r Tucker rank, h cores, m top-m, n keys per
side, E expansion, N physical rows, V value width (paper sections 3 and E).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ultramem_ds.config.validation import STRICT, require

Partition: TypeAlias = Literal["auto", "number-wise", "dimension-wise", "owner-pooled"]
TableOptimizer: TypeAlias = Literal["dense", "row-sparse", "row-sparse-catch-up"]
Candidates: TypeAlias = Literal["one-sided", "two-sided", "two-sided-full"]


@dataclass(frozen=True, kw_only=True)
class MemoryLayerConfig:
    """Memory layers of kinds ``ultramem`` and ``pkm``: what they compute (section 3, Table 2)."""

    __pydantic_config__ = STRICT

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
    # How many tokens, the last ones, a query begins as a function of: one number, or one per layer
    query_tokens: int | str = 1  # 1/2: the first layer's queries know a token, the second's a pair
    qk_norm: Literal["none", "layernorm", "rmsnorm"] = "layernorm"  # on query and keys, over kdim
    softmax: bool = False  # softmax over the selected scores of a head (PKM)
    value_proj: bool = True  # project V -> D after pooling; without it V = D and E = 1
    shuffle: Literal["bijection", "stored", "none"] = "bijection"  # virtual slot permutation
    init: Literal["pkm", "paper", "corrected"] = "paper"  # initialisation recipe (model/init.py)
    aux_loss_weight: float = 0.001  # alpha of eq. 12
    aux_loss_margin: float = 0.15  # tau of eq. 12

    def __post_init__(self) -> None:
        for name in ("knum", "kdim", "value_dim", "top_m", "num_heads", "tucker_rank", "num_cores"):
            require(
                getattr(self, name) >= 1, f"memory.{name}={getattr(self, name)} must be at least 1"
            )
        root = math.isqrt(self.expansion) if self.expansion >= 1 else 0
        require(
            root >= 1 and root * root == self.expansion,
            f"memory.expansion={self.expansion} must be a perfect square (1, 4, 9, 16, ...)",
        )
        require(
            self.top_m <= self.num_keys,
            f"memory.top_m={self.top_m} exceeds the {self.num_keys} keys per side",
        )
        require(
            self.value_dim % self.num_cores == 0,
            f"memory.value_dim={self.value_dim} must be divisible by "
            f"memory.num_cores={self.num_cores}",
        )
        if self.retrieval == "product-key":
            require(
                self.tucker_rank == 1 and self.num_cores == 1,
                "memory.retrieval=product-key needs memory.tucker_rank=1 and memory.num_cores=1",
            )
            require(
                self.candidates == "one-sided",
                "memory.retrieval=product-key is exact: memory.candidates must stay one-sided",
            )
        if not self.value_proj:
            require(self.expansion == 1, "memory.value_proj=false needs memory.expansion=1")
        if self.candidates == "two-sided":
            require(self.top_m % 2 == 0, "memory.candidates=two-sided needs an even memory.top_m")
        require(
            not (self.softmax and self.num_cores > 1),
            "memory.softmax=true needs memory.num_cores=1",
        )
        require(
            self.query_conv >= 0,
            f"memory.query_conv={self.query_conv} must be 0 (none) or a kernel size",
        )
        require(
            self.aux_loss_weight >= 0,
            f"memory.aux_loss_weight={self.aux_loss_weight} must not be negative",
        )
        require(
            self.aux_loss_margin >= 0,
            f"memory.aux_loss_margin={self.aux_loss_margin} must not be negative",
        )
        require(len(self.spans) >= 1, "memory.placement names no memory layer")
        for tokens in self.tokens_of_queries:
            require(
                1 <= tokens <= max(1, self.query_conv),
                f"memory.query_tokens={self.query_tokens}: {tokens} is not between 1 and the "
                f"taps of memory.query_conv={self.query_conv}",
            )

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
    def tokens_of_queries(self) -> tuple[int, ...]:
        """``query_tokens`` parsed: one number per memory layer."""
        parts = str(self.query_tokens).split("/")
        valid = all(part.strip().isdigit() for part in parts)
        require(
            valid and len(parts) in (1, len(self.spans)),
            f"memory.query_tokens={self.query_tokens!r} is neither a number nor one for each of "
            f"the {len(self.spans)} memory layers, as in 1/2",
        )
        numbers = tuple(int(part) for part in parts)
        return numbers * len(self.spans) if len(numbers) == 1 else numbers

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """``placement`` parsed: 1-based (a, b) with a <= b, in order."""
        spans = []
        for part in self.placement.split("/"):
            begin, sep, end = part.partition(":")
            ok = sep and begin.strip().isdigit() and end.strip().isdigit()
            require(bool(ok), f"memory.placement={self.placement!r}: {part!r} is not a:b")
            a, b = int(begin), int(end)
            require(1 <= a <= b, f"memory.placement: {part!r} needs 1 <= a <= b")
            spans.append((a, b))
        return tuple(spans)


@dataclass(frozen=True, kw_only=True)
class MemoryConfig(MemoryLayerConfig):
    """Section ``memory``: the layers, and how their tables are spread, read and stepped."""

    __pydantic_config__ = STRICT

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
    table_optimizer: TableOptimizer = "dense"
    stats_every: int = 50  # optimizer steps between training-state statistics; 0 = never

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.shard_group_size >= 0,
            f"memory.shard_group_size={self.shard_group_size} must be 0 (all) or positive",
        )
        for name in ("wire_gb_per_s", "memory_gb_per_s"):
            rate = getattr(self, name)
            require(rate == "auto" or rate > 0, f"memory.{name}={rate} must be auto or positive")
        require(
            self.stats_every >= 0,
            f"memory.stats_every={self.stats_every} must be 0 (never) or positive",
        )
