"""The row-sparse Adam against torch.optim.AdamW on the same rows."""

import pytest
import torch

from ultramem_ds.kernels import row_adam_

KERNELS = ["reference", "cpu"]
HYPER = dict(lr=0.1, betas=(0.9, 0.95), eps=1e-8)


def make_state(dtype, num_rows=12, width=35):
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    values_RV = torch.randn(num_rows, width, generator=generator, dtype=wide).to(dtype)
    zeros = torch.zeros(num_rows, width, dtype=wide)
    grads = torch.randn(3, num_rows, width, generator=generator, dtype=wide)
    return values_RV, zeros, zeros.clone(), grads


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_on_all_rows_it_is_adamw(kernel, dtype):
    values_RV, exp_avg_RV, exp_avg_sq_RV, grads = make_state(dtype)
    parameter = torch.nn.Parameter(values_RV.clone())
    oracle = torch.optim.AdamW([parameter], weight_decay=0.1, **HYPER)
    rows_U = torch.arange(values_RV.shape[0])
    for step, grad_UV in enumerate(grads, start=1):
        parameter.grad = 0.5 * grad_UV
        oracle.step()
        row_adam_(
            rows_U,
            grad_UV,
            values_RV,
            exp_avg_RV,
            exp_avg_sq_RV,
            step=step,
            weight_decay=0.1,
            grad_scale=0.5,
            kernel=kernel,
            **HYPER,
        )
    # Three steps of the same formula, another order of a few operations each.
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-13}[dtype]
    torch.testing.assert_close(values_RV, parameter.detach(), rtol=tolerance, atol=tolerance)
    state = oracle.state[parameter]
    torch.testing.assert_close(exp_avg_RV, state["exp_avg"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(exp_avg_sq_RV, state["exp_avg_sq"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_not_listed_keep_values_and_moments(kernel):
    values_RV, exp_avg_RV, exp_avg_sq_RV, grads = make_state(torch.float32)
    exp_avg_RV.fill_(0.25)
    exp_avg_sq_RV.fill_(0.5)
    before = [tensor.clone() for tensor in (values_RV, exp_avg_RV, exp_avg_sq_RV)]
    rows_U = torch.tensor([1, 4, 11])
    row_adam_(
        rows_U,
        grads[0][rows_U],
        values_RV,
        exp_avg_RV,
        exp_avg_sq_RV,
        step=7,
        weight_decay=0.1,
        kernel=kernel,
        **HYPER,
    )
    others = [row for row in range(12) if row not in rows_U.tolist()]
    for old, new in zip(before, (values_RV, exp_avg_RV, exp_avg_sq_RV)):
        assert torch.equal(old[others], new[others])
        assert (old[rows_U] != new[rows_U]).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_bf16_table_is_rounded_once_to_nearest(kernel):
    values_RV, exp_avg_RV, exp_avg_sq_RV, grads = make_state(torch.bfloat16)
    wide_RV, wide_avg_RV, wide_avg_sq_RV = values_RV.float(), exp_avg_RV.clone(), exp_avg_RV.clone()
    arguments = (torch.arange(12), grads[0])
    row_adam_(*arguments, values_RV, exp_avg_RV, exp_avg_sq_RV, step=1, kernel=kernel, **HYPER)
    row_adam_(*arguments, wide_RV, wide_avg_RV, wide_avg_sq_RV, step=1, kernel="reference", **HYPER)
    # One unit in the last of bf16's 8 bits, for fp32 results that straddle a rounding boundary.
    torch.testing.assert_close(values_RV, wide_RV.bfloat16(), rtol=2**-7, atol=0)
    assert (values_RV == wide_RV.bfloat16()).float().mean() > 0.99
    torch.testing.assert_close(exp_avg_RV, wide_avg_RV, rtol=1e-6, atol=0)


def test_bad_arguments_are_named():
    values_RV, exp_avg_RV, exp_avg_sq_RV, grads = make_state(torch.float32)

    def update(rows, grad_UV=None, avg_RV=exp_avg_RV, step=1):
        rows_U = torch.tensor(rows)
        grad_UV = grads[0][: len(rows)] if grad_UV is None else grad_UV
        row_adam_(rows_U, grad_UV, values_RV, avg_RV, exp_avg_sq_RV, step=step, lr=0.1)

    for rows in ([3, 3], [4, 3], [-1, 3], [3, 12]):
        with pytest.raises(ValueError, match="distinct, ascending"):
            update(rows)
    with pytest.raises(ValueError, match="gradients"):
        update([1, 2], grad_UV=grads[0][:3])
    with pytest.raises(ValueError, match="exp_avg "):
        update([1, 2], avg_RV=exp_avg_RV.bfloat16())
    with pytest.raises(ValueError, match="first update is step 1"):
        update([1, 2], step=0)
