"""The mixture-of-experts baseline on one process: top-k gate, balance loss, bias-free GELU experts.

For training, ``zero/parallelize`` installs ``deepspeed.moe.layer.MoE`` around the same gate
settings and the same expert; this module is what a single process evaluates and generates with and
what tests compare DeepSpeed's layer to. It drops no token.

Letters: T tokens, D hidden, X experts, k experts per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultramem_ds.config.schema import ModelConfig, MoEConfig
from ultramem_ds.model.transformer import FeedForward, MLPOutput, make_linear


class MixtureOfExperts(nn.Module):
    """Top-k gated experts, all on this process.

    The gate's arithmetic is DeepSpeed's (``deepspeed/moe/sharded_moe.py``): softmax in fp32, the k
    largest gates renormalised to sum to one, and the balance loss
    ``X * sum_x(mean gate_x * share_x)`` (Fedus et al., 2022), where ``share``
    counts first choices.
    """

    def __init__(self, model: ModelConfig, moe: MoEConfig) -> None:
        super().__init__()
        self.top_k = moe.top_k
        self.gate = make_linear(model.hidden_size, moe.num_experts)
        self.experts = nn.ModuleList(
            FeedForward(model.hidden_size, model.inner_size) for _ in range(moe.num_experts)
        )

    def route(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose experts.

        Returns:
            ``weights_Tk`` (fp32, rows sum to one for k > 1), ``experts_Tk`` (int64) and the
            unweighted balance loss (0-dim, fp32).
        """
        gates_TX = F.linear(x_TD.float(), self.gate.weight.float()).softmax(dim=-1)
        weights_Tk, experts_Tk = gates_TX.topk(self.top_k, dim=-1)
        num_experts = gates_TX.shape[-1]
        first_TX = F.one_hot(experts_Tk[:, 0], num_experts).float()
        balance_loss = num_experts * (gates_TX.mean(0) * first_TX.mean(0)).sum()
        if self.top_k > 1:
            weights_Tk = weights_Tk / weights_Tk.sum(-1, keepdim=True)
        return weights_Tk, experts_Tk, balance_loss

    def forward(self, x_BSD: Tensor) -> MLPOutput:
        """Route every token to its experts and sum their weighted outputs."""
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        weights_Tk, experts_Tk, balance_loss = self.route(x_TD)
        counts_X = torch.bincount(experts_Tk.flatten(), minlength=len(self.experts))
        token_M = experts_Tk.flatten().argsort(stable=True)
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for expert, entry_E in zip(self.experts, token_M.split(counts_X.tolist())):
            if entry_E.numel() == 0:
                continue
            rows_E = entry_E // self.top_k
            out_ED = expert(x_TD[rows_E]).float() * weights_Tk.flatten()[entry_E].unsqueeze(-1)
            y_TD = y_TD.index_add(0, rows_E, out_ED)
        return MLPOutput(y_TD.to(x_BSD.dtype).view_as(x_BSD), balance_loss, counts_X)


def sum_choices(weighted_MD: Tensor, order_M: Tensor, top_k: int) -> Tensor:
    """The sum of each token's k weighted answers, (T, D), in the order of its choices.

    Whatever order the entries come in: adding them where they are (``index_add``) would on a GPU
    add in any order.

    Args:
        weighted_MD: answers of the M = T*k entries.
        order_M: which entry, token by token and choice by choice, each of them is.
        top_k: k.
    """
    num_entries, width = weighted_MD.shape
    entries_MD = torch.empty_like(weighted_MD).index_copy_(0, order_M, weighted_MD)
    return entries_MD.view(num_entries // top_k, top_k, width).sum(1)
