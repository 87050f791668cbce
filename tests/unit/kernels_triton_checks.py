"""Run by test_kernels_triton.py with TRITON_INTERPRET=1 (or on a GPU, where that is not set)."""

import os

import pytest
import torch

from ultramem_ds.kernels import bag_reduce, lookup_reduce, registry, row_adam_

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# Another order of summation over at most 12 terms of size about 1; bf16: one rounding, 2^-9.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float64: 1e-12}
SHAPES = [
    dict(T=3, K=6, E=3, V=24, h=2, R=7, dtype=torch.float32),
    dict(T=2, K=4, E=1, V=7, h=1, R=5, dtype=torch.float64),
    dict(T=2, K=12, E=5, V=600, h=3, R=9, dtype=torch.bfloat16),  # more columns than a tile
    dict(T=0, K=4, E=2, V=8, h=2, R=5, dtype=torch.float32),
    # Hot rows: 300 entries in runs of 64, rows that span several runs or end at their edges.
    dict(T=25, K=12, E=2, V=10, h=2, R=3, dtype=torch.float32),
    dict(T=32, K=4, E=1, V=3, h=1, R=2, dtype=torch.float32),
]


def make_problem(T, K, E, V, h, R, dtype):
    generator = torch.Generator().manual_seed(1)
    wide = torch.promote_types(dtype, torch.float32)
    values_RV = torch.randn(R, V, generator=generator, dtype=wide).to(dtype)
    rows_TK = torch.randint(0, R, (T, K), generator=generator)
    projectors_TK = torch.randint(0, E, (T, K), generator=generator)
    scores_TKh = torch.randn(T, K, h, generator=generator, dtype=wide)
    grad_TEV = torch.randn(T, E, V, generator=generator, dtype=wide).to(dtype)
    problem = (values_RV, rows_TK, projectors_TK, scores_TKh, grad_TEV)
    return tuple(tensor.to(DEVICE) for tensor in problem)


def run(kernel, problem, ragged):
    """Pooled, accumulated table gradient (on top of ones) and score gradients."""
    values_RV, rows_TK, projectors_TK, scores_TKh, grad_TEV = problem
    T, K = rows_TK.shape
    E = grad_TEV.shape[1]
    wide = torch.promote_types(values_RV.dtype, torch.float32)
    buffer_RV = torch.ones_like(values_RV, dtype=wide)
    scores = scores_TKh.clone().requires_grad_()
    if ragged:  # bags of unequal size, an empty one among them
        offsets = torch.tensor([0, 0, min(2, T * K), T * K], device=DEVICE)
        pooled = bag_reduce(
            values_RV,
            rows_TK.flatten(),
            offsets,
            scores.flatten(0, 1),
            grad_values_RV=buffer_RV,
            kernel=kernel,
        )
        grad = torch.linspace(-1, 1, pooled.numel(), device=DEVICE).view_as(pooled)
    else:
        pooled = lookup_reduce(
            values_RV, rows_TK, projectors_TK, scores, E, grad_values_RV=buffer_RV, kernel=kernel
        )
        grad = grad_TEV
    pooled.backward(grad.to(pooled.dtype))
    return pooled.detach(), buffer_RV, scores.grad


@pytest.mark.parametrize("ragged", [False, True], ids=["rectangular", "ragged"])
@pytest.mark.parametrize("kernel", ["triton", "triton-atomic"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_reference(shape, kernel, ragged):
    problem = make_problem(**shape)
    assert registry.resolve(kernel, torch.device(DEVICE)).name == kernel
    actual = run(kernel, problem, ragged)
    expected = run("reference", problem, ragged)
    for name, got, want in zip(("pooled", "grad_values", "grad_scores"), actual, expected):
        assert got.dtype == want.dtype, name
        tolerance = TOLERANCE[want.dtype]
        scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * scale, msg=name)


def test_backward_is_bitwise_reproducible():
    problem = make_problem(T=8, K=12, E=2, V=16, h=2, R=3, dtype=torch.float32)
    first, second = run("triton", problem, False), run("triton", problem, False)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("num_entries", [1, 64, 65, 200])
def test_rows_are_added_in_order(num_entries):
    generator = torch.Generator().manual_seed(num_entries)
    rows_M = torch.randint(0, 4, (num_entries,), generator=generator).to(DEVICE)
    values_MV = torch.randn(num_entries, 9, generator=generator).to(DEVICE)
    found = []
    for kernel in ("triton", "triton-atomic", "reference"):
        target_RV = torch.ones(4, 9, device=DEVICE)
        registry.resolve(kernel, target_RV.device).add_rows_(target_RV, rows_M, values_MV)
        found.append(target_RV)
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_row_adam_against_the_reference(dtype):
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    rows_U = torch.tensor([1, 4, 11], device=DEVICE)
    state = torch.rand(3, 12, 600, generator=generator, dtype=wide)
    grad_UV = torch.randn(3, 600, generator=generator, dtype=wide).to(DEVICE)
    found = []
    for kernel in ("triton", "reference"):
        values, avg, avg_sq = state.clone().to(DEVICE)
        values = values.to(dtype)
        scalars = dict(step=3, lr=0.1, weight_decay=0.1, grad_scale=0.5, kernel=kernel)
        row_adam_(rows_U, grad_UV, values, avg, avg_sq, **scalars)
        found.append((values, avg, avg_sq))
    for got, want in zip(*found):
        # The same formula, a few operations in another order; bf16: one rounding apart.
        tolerance = 2**-7 if got.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(got, want, rtol=tolerance, atol=1e-6)
