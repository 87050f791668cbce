"""The optimizer of training: torch's arithmetic, without torch's compiler."""

from __future__ import annotations

import subprocess
import sys

import torch

from ultramem_ds.optim.adamw import AdamW

PROBE = """
import sys, torch
from ultramem_ds.optim.adamw import AdamW
param = torch.nn.Parameter(torch.ones(4))
optimizer = AdamW([param], lr=0.1, fused=True)
param.grad = torch.ones(4)
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
print([m for m in ("torch._dynamo", "torch._inductor", "triton", "sympy") if m in sys.modules])
"""


def test_a_step_loads_no_compiler() -> None:
    found = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_steps_state_and_hooks_are_torch_s() -> None:
    """To the last bit, through a saved state, and with hooks around the step."""
    generator = torch.Generator().manual_seed(0)
    start, calls = torch.randn(64, generator=generator), []
    params = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    settings = dict(lr=0.1, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    ours, theirs = (kind([p], **settings) for kind, p in zip((AdamW, torch.optim.AdamW), params))
    ours.register_step_pre_hook(lambda *_: calls.append("before"))
    ours.register_step_post_hook(lambda *_: calls.append("after"))
    for step in range(4):
        grad = torch.randn(64, generator=generator)
        for param, optimizer in zip(params, (ours, theirs)):
            param.grad = grad.clone()
            optimizer.step()
        if step == 1:
            ours.load_state_dict(ours.state_dict())
    assert torch.equal(*params) and not torch.equal(params[0], start)
    assert calls == ["before", "after"] * 4
    assert torch.is_grad_enabled()
