"""``torch.compile`` of what a block computes (``train.compile``).

A block is compiled whole, without a break: its ``forward``, not the module, so that hooks on the
module (ZeRO-3 gathers a block's parameters in them) stay outside. The memory layers between blocks
are left as they are: selection, lookup and exchange are native calls or Triton kernels, and what
surrounds them is one projection. Of a mixture of experts the attention is compiled: routing sends
tokens where the numbers say, and DeepSpeed's layer asks the host for them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ultramem_ds.kernels.reference import ReferenceKernel
from ultramem_ds.model.transformer import Attention, AttentionContext, Block, DenseMLP, KVSlot

if TYPE_CHECKING:
    from ultramem_ds.model.lm import LanguageModel


def compile_blocks(model: LanguageModel, backend: str | Callable[..., Any] = "inductor") -> None:
    """From here on the blocks of ``model`` train compiled; it happens at the first forward.

    Blocks of one shape share their code. Without gradients (evaluation, whose batches have all
    shapes, and decoding) they run as they are. Dropout draws other numbers than without.

    Args:
        model: before or after :func:`ultramem_ds.model.recompute.recompute_blocks`.
        backend: of ``torch.compile``.
    """
    for block in model.blocks:
        block = cast(Block, block)
        # Training's attention is torch's whatever the kernel, whose choice cannot be traced.
        block.attention.kernel = ReferenceKernel()
        part: Block | Attention = block if isinstance(block.mlp, DenseMLP) else block.attention
        compiled = torch.compile(part.forward, fullgraph=True, dynamic=False, backend=backend)
        part.forward = partial(_forward, part.forward, compiled)  # type: ignore[method-assign]


def _forward(
    eager: Callable[..., Any],
    compiled: Callable[..., Any],
    x_BSD: Tensor,
    context: AttentionContext,
    kv: KVSlot | None = None,
) -> Any:
    """The compiled forward where gradients are wanted."""
    if kv is None and torch.is_grad_enabled():
        return compiled(x_BSD, context)
    return eager(x_BSD, context, kv)
