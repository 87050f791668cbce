"""Singular vectors: valid, continuous, refreshed; the auxiliary loss."""

import math

import pytest
import torch

from tests.unit.memory_helpers import inputs, make_layer, run
from ultramem_ds.model.memory.scores import leading_pair, singular_vectors


def expected_product(form):
    """sigma_1 u v^T of the summed core, free of the sign."""
    left, sigma, right_t = torch.linalg.svd(form.core.detach().sum(0))
    return left[:, :, :1] * right_t[:, :1, :], sigma


def product_of(directions):
    return directions[0][:, :, None] * directions[1][:, None, :]


@pytest.mark.parametrize("mode", [True, False])
def test_valid_at_the_first_forward(mode):
    layer = make_layer(tucker_rank=3).train(mode)
    assert not layer.retrieval.form.directions.any()
    run(layer, inputs())
    form = layer.retrieval.form
    torch.testing.assert_close(product_of(form.directions), expected_product(form)[0])


def test_refreshed_when_the_cores_change():
    layer = make_layer(tucker_rank=3).eval()
    run(layer, inputs())
    form = layer.retrieval.form

    def is_current():
        run(layer, inputs())
        return torch.allclose(product_of(form.directions), expected_product(form)[0])

    with torch.no_grad():
        form.core.add_(torch.randn_like(form.core))  # an optimizer's in-place update
    assert is_current()
    form.core.data += torch.randn_like(form.core)  # invisible, as DeepSpeed does it
    layer.mark_stale()
    assert is_current()
    layer.load_state_dict(make_layer(seed=9, tucker_rank=3).state_dict())
    assert is_current()
    layer.to(torch.bfloat16)  # rounds the cores: the vectors are theirs, in fp32
    run(layer, inputs(dtype=torch.bfloat16))
    left, _, right_t = torch.linalg.svd(form.core.detach().float().sum(0))
    expected = left[:, :, :1] * right_t[:, :1, :]
    torch.testing.assert_close(product_of(form.directions), expected, rtol=1e-5, atol=1e-6)


def test_sign_is_kept_through_updates_and_loads():
    layer = make_layer(tucker_rank=2).eval()
    form = layer.retrieval.form
    run(layer, inputs())
    for flip in (1.0, -1.0):  # whichever sign an SVD happens to return, we keep ours
        form.directions.copy_(form.directions.abs() * flip)
        for step in range(40):
            before = form.directions.clone()
            with torch.no_grad():  # turn the core slowly through a full circle
                angle = torch.tensor(2 * math.pi / 40 * (step % 2 + 1))
                turn = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
                form.core.copy_(form.core @ turn.double())
            run(layer, inputs())
            assert (before * form.directions).sum() > 0
    resumed = make_layer(seed=4, tucker_rank=2).eval()
    resumed.load_state_dict(layer.state_dict())
    run(resumed, inputs())
    torch.testing.assert_close(resumed.retrieval.form.directions, form.directions)


def test_first_sign_makes_the_largest_entry_positive():
    core = torch.randn(8, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    vectors = leading_pair(singular_vectors(core), torch.zeros(2, 8, 3, dtype=torch.float64))
    by_head = vectors.transpose(0, 1).flatten(1)
    assert (by_head.max(1).values == by_head.abs().max(1).values).all()


def test_aux_loss_is_equation_12():
    """Diagonal cores show their singular values: 0.5, 0.3, 0.1 and 1.0, 0.2, 0.15."""
    core = torch.diag_embed(torch.tensor([[0.3, 0.5, 0.1], [0.2, 0.15, 1.0]], dtype=torch.float64))
    form = make_layer(tucker_rank=3, num_cores=1, aux_loss_margin=0.15).train().retrieval.form
    with torch.no_grad():
        form.core.copy_(core[None])
    loss = form().aux_loss
    per_head = [(0.3 - 0.15) ** 2 / 2, (0.2 - 0.15) ** 2 / 2]
    torch.testing.assert_close(loss.item(), sum(per_head) / 2)
    loss.backward()
    # d loss / d sigma_i = (sigma_i - margin) / (r - 1) per head, halved by the mean over heads
    # and doubled by the square.
    grads = form.core.grad[0].diagonal(dim1=-2, dim2=-1)
    expected = torch.tensor([[0.15, 0.0, 0.0], [0.05, 0.0, 0.0]], dtype=torch.float64) / 2
    torch.testing.assert_close(grads, expected, rtol=1e-6, atol=1e-9)


def test_aux_loss_only_in_training_and_above_rank_one():
    layer = make_layer(tucker_rank=2, aux_loss_margin=0.0)
    assert layer.train().start(inputs()).aux_loss > 0
    assert layer.eval().start(inputs()).aux_loss == 0
    assert make_layer(tucker_rank=1).train().start(inputs()).aux_loss == 0


def test_aux_loss_has_the_gradient_of_the_singular_values():
    """Against torch's own derivative of the decomposition, for a general core."""
    form = make_layer(tucker_rank=4, num_cores=3, aux_loss_margin=0.01).train().retrieval.form
    form().aux_loss.backward()
    core = form.core.detach().clone().requires_grad_()
    excess = (torch.linalg.svdvals(core.sum(0))[:, 1:] - 0.01).clamp(min=0)
    (excess.square().sum(-1).mean() / 3).backward()
    torch.testing.assert_close(form.core.grad, core.grad, rtol=1e-9, atol=1e-12)
