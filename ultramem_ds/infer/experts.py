"""Mixture of experts for decoding: stacked weights, and only the chosen experts are read.

DeepSpeed's module runs every local expert for every call; the training module here loops over
experts in Python. Decoding sorts the (token, choice) entries by expert and multiplies each run of
entries with its expert in one grouped product: experts without entries cost nothing, an expert's
weights are read once however many tokens chose it, and nothing waits for the host.

Letters: T tokens, D hidden, F inner width, X experts, k experts per token, M = T*k entries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultramem_ds.model.moe import MixtureOfExperts
from ultramem_ds.model.transformer import FeedForward, MLPOutput


class GroupedExperts(nn.Module):
    """The function of a :class:`MixtureOfExperts`, whose experts it takes over one by one."""

    def __init__(self, source: MixtureOfExperts) -> None:
        super().__init__()
        self.source_route = source.route
        self.gate = source.gate
        self.top_k = source.top_k
        experts = [expert for expert in source.experts if isinstance(expert, FeedForward)]
        self.up_XDF = nn.Parameter(_stack([e.up_proj for e in experts]), requires_grad=False)
        self.down_XFD = nn.Parameter(_stack([e.down_proj for e in experts]), requires_grad=False)
        source.experts = nn.ModuleList()

    def forward(self, x_BSD: Tensor) -> MLPOutput:
        """Route every token to its experts and sum their weighted outputs."""
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        weights_Tk, experts_Tk, balance_loss = self.source_route(x_TD)
        num_experts = self.up_XDF.shape[0]
        experts_M, order_M = experts_Tk.flatten().sort(stable=True)
        tokens_M = order_M // self.top_k
        counts_X = torch.zeros(num_experts, dtype=torch.int64, device=x_TD.device)
        counts_X = counts_X.scatter_add(0, experts_M, torch.ones_like(experts_M))
        ends_X = counts_X.cumsum(0).to(torch.int32)
        inner_MF = F.gelu(F.grouped_mm(x_TD[tokens_M], self.up_XDF, offs=ends_X))
        out_MD = F.grouped_mm(inner_MF, self.down_XFD, offs=ends_X).float()
        weighted_MD = out_MD * weights_Tk.flatten()[order_M].unsqueeze(-1)
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32).index_add(0, tokens_M, weighted_MD)
        return MLPOutput(y_TD.to(x_BSD.dtype).view_as(x_BSD), balance_loss, counts_X)


def _stack(linears: list[nn.Linear]) -> Tensor:
    """Weights as ``(X, in, out)``, last dimension strided; each source is emptied once copied."""
    out_features, in_features = linears[0].weight.shape
    like = linears[0].weight
    stacked = like.new_empty(len(linears), out_features, in_features, requires_grad=False)
    for slot, linear in zip(stacked, linears):
        slot.copy_(linear.weight.detach())
        linear.weight = nn.Parameter(like.new_empty(0), requires_grad=False)
    return stacked.transpose(1, 2)
