"""DeepSpeed-MoE around the model's gate settings and expert (paper section 5.1).

A group of ranks holds equally many experts each, so where their number does not divide, the last
ranks' remaining slots are *padding*: the gate knows nothing of it, no token goes there. Padding has
the parameters of an expert, zero, because ranks must reduce gradients in equal pieces; they get
zero gradients, and neither counts nor checkpoints name them.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ultramem_ds.config.schema import Config
from ultramem_ds.model.roles import tag
from ultramem_ds.model.transformer import FeedForward, MLPOutput
from ultramem_ds.planning.experts import ExpertLayout, expert_layout
from ultramem_ds.zero.deepspeed_import import deepspeed


@dataclass(frozen=True)
class ExpertShare:
    """The experts of one rank.

    Attributes:
        layout: how they are spread; None for kinds without any.
        first: global index of this rank's first expert.
    """

    layout: ExpertLayout | None
    first: int

    @classmethod
    def of(cls, config: Config, rank: int, world_size: int) -> ExpertShare:
        """The share of ``rank``.

        Raises:
            ValueError: the experts cannot be spread over the ranks as asked for.
        """
        if config.model.kind != "moe":
            return cls(None, 0)
        layout = expert_layout(config, world_size)
        return cls(layout, layout.first_expert(rank))

    def canonical_name(self, name: str) -> str:
        """The name that a parameter has in the one-process model, see :func:`canonical_name`."""
        return canonical_name(name, self.first)


class ExpertParallelMLP(nn.Module):
    """DeepSpeed's MoE layer as a block's MLP.

    Constructed so that results do not depend on the number of ranks unless asked: no token is
    dropped, no random token selection, no sampling of the second expert.

    Args:
        config: of the experts and their gate.
        share: this rank's experts, of kind moe.
    """

    def __init__(self, config: Config, share: ExpertShare) -> None:
        super().__init__()
        moe, layout = config.moe, share.layout
        assert layout is not None
        self.num_experts = moe.num_experts
        gate: dict[str, Any] = dict(
            k=moe.top_k,
            capacity_factor=moe.capacity_factor,
            eval_capacity_factor=moe.capacity_factor,
            min_capacity=4,
            drop_tokens=moe.drop_tokens,
            use_rts=moe.use_rts,
            top2_2nd_expert_sampling=moe.top2_2nd_expert_sampling,
        )
        with contextlib.redirect_stdout(sys.__stderr__):
            self.moe = deepspeed.moe.layer.MoE(
                hidden_size=config.model.hidden_size,
                expert=FeedForward(config.model.hidden_size, config.model.inner_size),
                num_experts=layout.num_slots,
                ep_size=layout.group_size,
                **gate,
            )
        layer = self.moe.deepspeed_moe
        if layout.padding:
            layer.gate = PaddedGate(config.model.hidden_size, layout, **gate)
        tag(layer.gate.wg.weight, role="matrix", init="matrix")
        experts = layer.experts.deepspeed_experts
        for slot, expert in enumerate(experts):
            # DeepSpeed's deep copies of the expert lose the tags of its parameters.
            tag(expert.up_proj.weight, role="matrix", init="matrix")
            tag(expert.down_proj.weight, role="matrix", init="residual")
            if share.first + slot >= moe.num_experts:
                experts[slot] = PaddingExpert(expert)

    def forward(self, x_BSD: Tensor) -> MLPOutput:
        """Route, exchange tokens with the experts' ranks, and combine."""
        return MLPOutput(*self.moe(x_BSD))


class PaddedGate(deepspeed.moe.sharded_moe.TopKGate):
    """DeepSpeed's gate over the experts that there are, dispatching to as many slots as there are.

    Probabilities, choices, capacity and balance loss are those without padding, to the last bit.
    """

    def __init__(self, hidden_size: int, layout: ExpertLayout, **settings: Any) -> None:
        super().__init__(hidden_size, layout.num_experts, **settings)
        self.num_slots = layout.num_slots

    def forward(self, *args: Any, **options: Any) -> tuple[Any, ...]:
        """What DeepSpeed's MoE layer takes: its third value sizes the buffers of tokens."""
        balance_loss, capacity, _, *routes = super().forward(*args, **options)
        return balance_loss, capacity, self.num_slots, *routes


class PaddingExpert(nn.Module):
    """What stands in a slot without an expert: zero parameters, zeros out, zero gradients.

    Args:
        expert: whose parameters it takes over.
    """

    def __init__(self, expert: FeedForward) -> None:
        super().__init__()
        self.up_proj, self.down_proj = expert.up_proj, expert.down_proj
        for param in self.parameters():
            param.is_padding = True  # type: ignore[attr-defined]
            nn.init.zeros_(param)

    def forward(self, x: Tensor) -> Tensor:
        """Zeros of the shape of ``x``."""
        y: Tensor = _Zeros.apply(x, self.up_proj.weight, self.down_proj.weight)
        return y


class _Zeros(torch.autograd.Function):
    """Zeros, with zero gradients for everything it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(*weights)
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return torch.zeros_like(grad), *map(torch.zeros_like, ctx.saved_tensors)


def is_padding(param: Tensor) -> bool:
    """Whether a parameter belongs to no expert."""
    return getattr(param, "is_padding", False)


# As DeepSpeed's _get_expert_ckpt_name makes them.
_FILE = re.compile(r"layer_\d+_expert_(\d+)_mp_rank_")


def padding_files(model: nn.Module) -> Callable[[str], bool]:
    """Tells the names of DeepSpeed's files that hold padding from all others."""
    mlps = [module for module in model.modules() if isinstance(module, ExpertParallelMLP)]
    if not mlps:
        return lambda _: False

    def holds_padding(name: str) -> bool:
        match = _FILE.search(name)
        return match is not None and int(match[1]) >= mlps[0].num_experts

    return holds_padding


_GATE = re.compile(r"\.mlp\.moe\.deepspeed_moe\.gate\.wg\.")
_EXPERT = re.compile(r"\.mlp\.moe\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.")


def canonical_name(name: str, first_expert: int) -> str:
    """The name that a parameter has in the one-process model.

    Args:
        name: under DeepSpeed's MoE, where a rank's experts count from 0.
        first_expert: global index of this rank's first expert.

    Returns:
        For example ``blocks.0.mlp.experts.5.up_proj.weight``.
    """
    name = _GATE.sub(".mlp.gate.", name)
    return _EXPERT.sub(lambda m: f".mlp.experts.{first_expert + int(m[1])}.", name)
