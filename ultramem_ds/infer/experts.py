"""Mixture of experts for decoding: only the chosen experts are read, each once.

DeepSpeed's module runs every local expert for every call; the training module here loops over
experts in Python. Decoding sorts the (token, choice) entries by expert and multiplies each run of
entries with its expert in one grouped product: experts without entries cost nothing, an expert's
weights are read once however many tokens chose it, and nothing waits for the host.

Letters: T tokens, D hidden, F inner width, X experts, k experts per token, M = T*k entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultramem_ds.infer.weights import Packer
from ultramem_ds.model.moe import MixtureOfExperts, sum_choices
from ultramem_ds.model.transformer import FeedForward, MLPOutput

# ``x_TD`` to weights ``(T, k)``, experts ``(T, k)`` and the balance loss.
Router: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


class GroupedExperts(nn.Module):
    """The function of a :class:`MixtureOfExperts`, whose experts it takes over one by one."""

    def __init__(self, source: MixtureOfExperts, packer: Packer) -> None:
        super().__init__()
        experts = [expert for expert in source.experts if isinstance(expert, FeedForward)]
        self.num_experts = len(experts)
        self.top_k = source.top_k
        self.route: Router = source.route
        self.gate = source.gate
        self.up = packer([expert.up_proj for expert in experts])
        self.down = packer([expert.down_proj for expert in experts])
        source.experts = nn.ModuleList()

    def forward(self, x_BSD: Tensor) -> MLPOutput:
        """Route every token to its experts and sum their weighted outputs."""
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        weights_Tk, experts_Tk, balance_loss = self.route(x_TD)
        experts_M, order_M = experts_Tk.flatten().sort(stable=True)
        tokens_M = order_M // self.top_k
        counts_X = torch.zeros(self.num_experts, dtype=torch.int64, device=x_TD.device)
        counts_X = counts_X.scatter_add(0, experts_M, torch.ones_like(experts_M))
        ends_X = counts_X.cumsum(0)
        inner_MF = F.gelu(self.up(x_TD[tokens_M], ends_X))
        out_MD = self.down(inner_MF, ends_X).float()
        weighted_MD = out_MD * weights_Tk.flatten()[order_M].unsqueeze(-1)
        y_TD = sum_choices(weighted_MD, order_M, self.top_k)
        return MLPOutput(y_TD.to(x_BSD.dtype).view_as(x_BSD), balance_loss, counts_X)
