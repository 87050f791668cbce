"""Experts spread over ranks for evaluation: tokens travel to the experts that they chose.

The training baseline is DeepSpeed's layer (``zero/experts``); this one holds the same weights in
evaluation, where each rank keeps its share of the experts and nothing else.

Letters: T tokens, D hidden, X experts, k experts per token, M = T*k entries, P ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultramem_ds.config.schema import ModelConfig, MoEConfig
from ultramem_ds.model.moe import MixtureOfExperts, sum_choices
from ultramem_ds.model.transformer import FeedForward, MLPOutput
from ultramem_ds.sharding.comm import Comm


class ShardedExperts(nn.Module):
    """The function of a :class:`MixtureOfExperts`, whose experts the ranks of a group share.

    Every forward is three collectives: all ranks make the same number of forwards.

    Args:
        model: widths.
        moe: number of experts, of which the last rank may hold fewer, and how many a token takes.
        comm: the group.
    """

    def __init__(self, model: ModelConfig, moe: MoEConfig, comm: Comm) -> None:
        super().__init__()
        self.comm = comm
        self.num_experts = moe.num_experts
        self.top_k = moe.top_k
        self.per_rank = -(-moe.num_experts // comm.world_size)
        # Routing is the one-process module's; without its experts it is the gate.
        router = MixtureOfExperts(model, moe)
        self.route = router.route
        self.gate = router.gate
        first = comm.rank * self.per_rank
        # Named by their global index, as in the one-process model.
        self.experts = nn.ModuleDict(
            {
                str(index): FeedForward(model.hidden_size, model.inner_size)
                for index in range(first, min(first + self.per_rank, moe.num_experts))
            }
        )

    def forward(self, x_BSD: Tensor) -> MLPOutput:
        """Route every token, ask the experts' ranks, and sum the weighted answers."""
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        weights_Tk, experts_Tk, balance_loss = self.route(x_TD)
        chosen_M = experts_Tk.flatten()
        order_M = chosen_M.argsort(stable=True)
        counts_X = torch.bincount(chosen_M, minlength=self.num_experts)
        padding = self.comm.world_size * self.per_rank - self.num_experts
        counts_PX = F.pad(counts_X, (0, padding)).view(self.comm.world_size, self.per_rank)
        wanted_PX = self.comm.exchange_counts(counts_PX)
        send, recv = counts_PX.sum(1).tolist(), wanted_PX.sum(1).tolist()
        asked_MD = self.comm.all_to_all(x_TD[order_M // self.top_k], send, recv, "rows")
        answers_MD = self.comm.all_to_all(self._answer(asked_MD, wanted_PX), recv, send, "rows")
        weighted_MD = answers_MD.float() * weights_Tk.flatten()[order_M].unsqueeze(-1)
        y_TD = sum_choices(weighted_MD, order_M, self.top_k)
        return MLPOutput(y_TD.to(x_BSD.dtype).view_as(x_BSD), balance_loss, counts_X)

    def _answer(self, asked_MD: Tensor, wanted_PX: Tensor) -> Tensor:
        """Run this rank's experts on what all ranks sent: by rank, then by expert."""
        expert_M = torch.arange(self.per_rank, device=asked_MD.device).repeat(len(wanted_PX))
        expert_M = expert_M.repeat_interleave(wanted_PX.flatten())
        out_MD = torch.empty_like(asked_MD)
        for index, expert in enumerate(self.experts.values()):
            entries_M = (expert_M == index).nonzero().flatten()
            if len(entries_M):
                out_MD[entries_M] = expert(asked_MD[entries_M])
        return out_MD
