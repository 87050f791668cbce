"""Row-sparse AdamW against torch's dense AdamW."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ultramem_ds.config.schema import OptimConfig
from ultramem_ds.optim.row_adam import CatchUpRowAdam, LazyRowAdam

DECAY = 0.1
OPTIM = OptimConfig(weight_decay=0.7, value_weight_decay=DECAY)  # the former is not the tables'
NUM_ROWS, WIDTH = 12, 8


def learning_rate(step: int) -> float:
    """Changes from step to step, as a schedule does."""
    return 0.01 * (1.0 + 0.5 * (step % 7))


def dense_steps(values_RV: Tensor, touched: list[list[int]], grads: list[Tensor]) -> dict:
    """torch's AdamW over the whole table, gradients zero where untouched."""
    param = torch.nn.Parameter(values_RV.clone())
    adam = torch.optim.AdamW(
        [param], betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps, weight_decay=DECAY
    )
    for step, (rows, grad_UV) in enumerate(zip(touched, grads)):
        adam.param_groups[0]["lr"] = learning_rate(step)
        param.grad = torch.zeros_like(param)
        param.grad[rows] = 0.5 * grad_UV
        adam.step()
    return {"values": param.detach(), **adam.state[param]}


def sparse_steps(
    adam: LazyRowAdam,
    touched: list[list[int]],
    grads: list[Tensor],
    first: int = 0,
    looked_up_here: bool = True,
) -> None:
    """The same gradients, only the touched rows handed over.

    ``looked_up_here=False`` is a copy of a table whose tokens read none of the rows it updates.
    """
    for step, (rows, grad_UV) in enumerate(zip(touched, grads), first):
        rows_U = torch.tensor(rows, dtype=torch.int64)
        if looked_up_here:
            adam.refresh(rows_U)
        adam.update(rows_U, grad_UV.clone(), learning_rate(step), 0.5)


def sparse_history(num_steps: int) -> tuple[Tensor, list[list[int]], list[Tensor]]:
    """Row 0 in every step, row 1 never, row 2 only in the first, the others now and then."""
    generator = torch.Generator().manual_seed(0)
    values_RV = torch.randn(NUM_ROWS, WIDTH, generator=generator)
    touched, grads = [], []
    for step in range(num_steps):
        some = torch.rand(NUM_ROWS, generator=generator) < 0.05
        some[:3] = torch.tensor([True, False, step == 0])
        touched.append(some.nonzero().flatten().tolist())
        grads.append(torch.randn(len(touched[-1]), WIDTH, generator=generator))
    return values_RV, touched, grads


@pytest.mark.parametrize("looked_up_here", [True, False])
@pytest.mark.parametrize("num_steps", [3, 60, 700])
def test_catch_up_is_dense_adamw(num_steps: int, looked_up_here: bool) -> None:
    """Values and moments of all rows, gaps longer than the momentum's memory included."""
    values_RV, touched, grads = sparse_history(num_steps)
    dense = dense_steps(values_RV, touched, grads)
    adam = CatchUpRowAdam(lambda: values_RV, OPTIM, "reference")
    sparse_steps(adam, touched, grads, looked_up_here=looked_up_here)
    adam.settle()
    # One fp32 rounding per step and row here against one per skipped step there: up to 1e-7 times
    # the number of steps; eps 1e-8 against sqrt(v) of 1e-1 decaying to 1e-3 while rho^k vanishes.
    torch.testing.assert_close(values_RV, dense["values"], rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(adam.exp_avg_RV, dense["exp_avg"], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(adam.exp_avg_sq_RV, dense["exp_avg_sq"], rtol=1e-4, atol=1e-7)


def test_catch_up_continues_after_settling_and_loading() -> None:
    """As a checkpoint does it: settled state into a new optimizer, then on."""
    values_RV, touched, grads = sparse_history(80)
    dense = dense_steps(values_RV, touched, grads)
    first = CatchUpRowAdam(lambda: values_RV, OPTIM, "reference")
    sparse_steps(first, touched[:33], grads[:33])
    first.settle()
    second = CatchUpRowAdam(lambda: values_RV, OPTIM, "reference")
    second.exp_avg_RV.copy_(first.exp_avg_RV)
    second.exp_avg_sq_RV.copy_(first.exp_avg_sq_RV)
    second.set_step(33)
    sparse_steps(second, touched[33:], grads[33:], first=33)
    second.settle()
    torch.testing.assert_close(values_RV, dense["values"], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_shows_the_caught_up_value_and_leaves_no_trace(dtype: torch.dtype) -> None:
    """Evaluation sees what training would, and training goes on as if nobody had looked."""
    values_RV, touched, grads = sparse_history(20)
    values_RV = values_RV.to(dtype)
    adam = CatchUpRowAdam(lambda: values_RV, OPTIM, "reference")
    sparse_steps(adam, touched, grads)
    held = [values_RV, adam.master_RV, adam.exp_avg_RV, adam.exp_avg_sq_RV]
    before = [tensor.clone() for tensor in held]
    rows_U = torch.arange(NUM_ROWS)
    read_UV = adam.read(rows_U)
    assert all(torch.equal(a, b) for a, b in zip(held, before))
    assert not torch.equal(read_UV, values_RV)  # row 2 has been waiting for 19 steps
    adam.refresh(rows_U)
    assert torch.equal(read_UV, values_RV)


def test_lazy_leaves_untouched_rows_alone() -> None:
    """Touched in every step: dense AdamW. Never: unchanged to the bit. Once: as after that step."""
    values_RV, touched, grads = sparse_history(40)
    start_RV = values_RV.clone()
    dense = dense_steps(values_RV, touched, grads)
    once = dense_steps(values_RV, touched[:1], grads[:1])
    adam = LazyRowAdam(lambda: values_RV, OPTIM, "reference")
    sparse_steps(adam, touched, grads)
    torch.testing.assert_close(values_RV[0], dense["values"][0], rtol=1e-5, atol=1e-6)
    assert torch.equal(values_RV[1], start_RV[1])
    torch.testing.assert_close(values_RV[2], once["values"][2], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(adam.exp_avg_RV[2], once["exp_avg"][2], rtol=1e-6, atol=1e-7)


def test_half_precision_shards_keep_fp32_masters() -> None:
    """The shard is the master rounded once; the master follows the fp32 run."""
    values_RV, touched, grads = sparse_history(30)
    half_RV = values_RV.bfloat16()
    values_RV.copy_(half_RV)
    full = CatchUpRowAdam(lambda: values_RV, OPTIM, "reference")
    mixed = CatchUpRowAdam(lambda: half_RV, OPTIM, "reference")
    for adam in (full, mixed):
        sparse_steps(adam, touched, grads)
        adam.settle()
    assert torch.equal(mixed.master_RV, values_RV)
    assert torch.equal(half_RV, values_RV.bfloat16())


def test_catch_up_needs_fading_momentum() -> None:
    """beta1 >= sqrt(beta2) would never let a skipped step's move vanish."""
    with pytest.raises(ValueError, match="row-sparse-catch-up needs"):
        CatchUpRowAdam(lambda: torch.zeros(2, 2), OptimConfig(beta1=0.99, beta2=0.95), "auto")
