"""How many tokens fit one forward: the automatic batch size."""

from __future__ import annotations

import torch

from ultramem_ds.config.schema import Architecture
from ultramem_ds.harness.plan import REACH

CPU_TOKENS = 4096  # more gain nothing: the products are large by then
LEAST, MOST = 256, 1 << 17
SHARE = 0.5  # of the free memory, the rest is the allocator's


def bytes_per_token(config: Architecture, itemsize: int) -> int:
    """Device memory that a token of a forward may take: generous, from the configuration.

    Counted are keys and values of all blocks, one block's activations, the joined keys and values
    of a branch (``REACH`` positions a token), logits twice in fp32, and a memory layer's scores.
    """
    model, memory = config.model, config.memory
    kept = 2 * model.num_layers * model.hidden_size
    block = 12 * model.hidden_size + 2 * model.inner_size + 4 * REACH * model.hidden_size
    scores = 0
    if config.has_memory:
        scores = 3 * 2 * memory.num_heads * memory.num_keys
        scores += 3 * memory.num_heads * memory.top_m**2 + memory.expansion * memory.value_dim
    return itemsize * (kept + block + model.vocab_size) + 4 * (2 * model.vocab_size + scores)


def max_tokens(config: Architecture, device: torch.device, dtype: torch.dtype) -> int:
    """Tokens of one forward on ``device`` with what is free there now."""
    if device.type != "cuda":
        return CPU_TOKENS
    free, _ = torch.cuda.mem_get_info(device)
    tokens = int(SHARE * free) // bytes_per_token(config, dtype.itemsize)
    return min(MOST, max(LEAST, tokens))
