"""Results of the native kernel do not depend on the number of threads."""

import pytest
import torch

from ultramem_ds.kernels import lookup_reduce


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_rows", [3, 5000], ids=["hot rows", "spread rows"])
def test_bitwise_equal_on_one_and_two_threads(restored_threads, num_rows):
    generator = torch.Generator().manual_seed(0)
    # Large enough for several threads: 200 * 16 entries of 96 columns.
    values_RV = torch.randn(num_rows, 96, generator=generator)
    rows_TK = torch.randint(0, num_rows, (200, 16), generator=generator)
    projectors_TK = torch.randint(0, 4, (200, 16), generator=generator)
    scores_TKh = torch.randn(200, 16, 2, generator=generator)
    grad_TEV = torch.randn(200, 4, 96, generator=generator)
    results = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        buffer_RV = torch.zeros_like(values_RV)
        scores = scores_TKh.clone().requires_grad_()
        pooled_TEV = lookup_reduce(
            values_RV, rows_TK, projectors_TK, scores, 4, grad_values_RV=buffer_RV, kernel="cpu"
        )
        pooled_TEV.backward(grad_TEV)
        results.append((pooled_TEV.detach(), buffer_RV, scores.grad))
    for one, two in zip(*results):
        assert torch.equal(one, two)
