"""DeepSpeed-MoE around the model's gate settings and expert (paper section 5.1)."""

from __future__ import annotations

import contextlib
import re
import sys
from dataclasses import dataclass

from torch import Tensor, nn

from ultramem_ds.config.schema import Config
from ultramem_ds.model.roles import tag
from ultramem_ds.model.transformer import FeedForward, MLPOutput
from ultramem_ds.planning.experts import expert_parallel_size
from ultramem_ds.zero.deepspeed_import import deepspeed


@dataclass(frozen=True)
class ExpertShare:
    """The experts of one rank.

    Attributes:
        group_size: ranks that share one set of experts; 0 for kinds without any.
        first: global index of this rank's first expert.
    """

    group_size: int
    first: int

    @classmethod
    def of(cls, config: Config, rank: int, world_size: int) -> ExpertShare:
        """The share of ``rank``.

        Raises:
            ValueError: the experts cannot be spread over the ranks.
        """
        if config.model.kind != "moe":
            return cls(0, 0)
        size = expert_parallel_size(config, world_size)
        return cls(size, (rank % size) * (config.moe.num_experts // size))

    def canonical_name(self, name: str) -> str:
        """The name that a parameter has in the one-process model, see :func:`canonical_name`."""
        return canonical_name(name, self.first)


class ExpertParallelMLP(nn.Module):
    """DeepSpeed's MoE layer as a block's MLP.

    Constructed so that results do not depend on the number of ranks unless asked: no token is
    dropped, no random token selection, no sampling of the second expert.
    """

    def __init__(self, config: Config, ep_size: int) -> None:
        super().__init__()
        moe = config.moe
        with contextlib.redirect_stdout(sys.__stderr__):
            self.moe = deepspeed.moe.layer.MoE(
                hidden_size=config.model.hidden_size,
                expert=FeedForward(config.model.hidden_size, config.model.inner_size),
                num_experts=moe.num_experts,
                ep_size=ep_size,
                k=moe.top_k,
                capacity_factor=moe.capacity_factor,
                eval_capacity_factor=moe.capacity_factor,
                drop_tokens=moe.drop_tokens,
                use_rts=moe.use_rts,
                top2_2nd_expert_sampling=moe.top2_2nd_expert_sampling,
            )
        tag(self.moe.deepspeed_moe.gate.wg.weight, role="matrix", init="matrix")
        for expert in self.moe.deepspeed_moe.experts.deepspeed_experts:
            # DeepSpeed's deep copies of the expert lose the tags of its parameters.
            tag(expert.up_proj.weight, role="matrix", init="matrix")
            tag(expert.down_proj.weight, role="matrix", init="residual")

    def forward(self, x_BSD: Tensor) -> MLPOutput:
        """Route, exchange tokens with the experts' ranks, and combine."""
        return MLPOutput(*self.moe(x_BSD))


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
