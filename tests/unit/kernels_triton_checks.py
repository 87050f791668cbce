"""Run by test_kernels_triton.py with TRITON_INTERPRET=1 (or on a GPU, where that is not set)."""

import os

import pytest
import torch

from ultramem_ds.kernels import bag_reduce, lookup_reduce, registry

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# Another order of summation over at most 12 terms of size about 1; bf16: one rounding, 2^-9.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float64: 1e-12}
SHAPES = [
    dict(T=3, K=6, E=3, V=24, h=2, R=7, dtype=torch.float32),
    dict(T=2, K=4, E=1, V=7, h=1, R=5, dtype=torch.float64),
    dict(T=2, K=12, E=5, V=600, h=3, R=9, dtype=torch.bfloat16),  # more columns than a tile
    dict(T=0, K=4, E=2, V=8, h=2, R=5, dtype=torch.float32),
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
