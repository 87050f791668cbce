"""Decode steps by formula, at any batch (the paper's Figure 7), and what measuring one would hold.

Letters: B sequences of one token each, K rows per token, N rows of a table, k experts per token, X
experts, H memory heads, n keys per side, h cores, E expansion, V value width.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import psutil
import torch

from ultramem_ds.bench.decode_cost import Rates, Touched, paper_bytes, step_parts
from ultramem_ds.bench.decode_models import KVMode, kv_bytes, num_draws
from ultramem_ds.config.schema import Config
from ultramem_ds.planning.costs import distinct_rows

_INDEX_BYTES = 8


def formula_row(
    config: Config, batch: int, mode: KVMode, element_size: int, rates: Rates | None
) -> dict[str, Any]:
    """What a step reads and multiplies, and the least time of it at measured rates.

    Args:
        config: of the model.
        batch: B.
        mode: cached keys and values.
        element_size: bytes of a weight.
        rates: of the machine; None leaves the time out.
    """
    memory, moe = config.memory, config.moe
    touched = Touched(
        experts=min(moe.top_k * batch, moe.num_experts) if config.model.kind == "moe" else 0.0,
        rows=distinct_rows(batch * memory.rows_per_token, memory.num_rows)
        if config.has_memory
        else 0.0,
    )
    cached = kv_bytes(config.model, batch, mode, element_size)
    parts = step_parts(config, batch, element_size, cached, touched)
    return {
        "preset": config.preset,
        "kind": config.model.kind,
        "batch": batch,
        "kv_mode": mode,
        "bytes_read": round(sum(part.num_bytes for part in parts)),
        "bytes_sparse_paper": paper_bytes(config, batch, element_size),
        "flops": round(sum(part.num_flops for part in parts)),
        "distinct_experts": touched.experts,
        "distinct_rows": touched.rows,
        "roofline_ms": rates.least_ms(parts) if rates else None,
    }


def measured_rates(rows: list[dict[str, Any]]) -> Rates | None:
    """The middle of what the probes found among some rows; None without any."""
    if not rows:
        return None
    return Rates(
        median(row["bandwidth_bytes_per_s"] for row in rows),
        median(row["matmul_flops_per_s"] for row in rows),
    )


def step_bytes(config: Config, batch: int, mode: KVMode, element_size: int) -> int:
    """Bytes that measuring a step holds beside the weights, estimated from above.

    The cache, the routings prepared in advance, and the activations of the widest layer.
    """
    model, memory = config.model, config.memory
    wide = 12 * model.hidden_size + 3 * model.inner_size * config.moe.top_k
    routed, draws = wide * element_size, model.num_layers * config.moe.top_k
    if config.has_memory:
        K = memory.rows_per_token
        search = 2 * memory.num_heads * memory.num_keys * (memory.tucker_rank + 1)
        routed += 4 * search + K * (3 * _INDEX_BYTES + 4 * memory.num_cores * memory.top_m)
        routed += 2 * memory.expansion * memory.value_dim * element_size
        draws = len(memory.spans) * K
    cached = kv_bytes(model, batch, mode, element_size)
    return batch * (routed + num_draws(batch) * draws * _INDEX_BYTES) + cached


def free_bytes(device: str) -> int:
    """What the device, or this machine, has free."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)
