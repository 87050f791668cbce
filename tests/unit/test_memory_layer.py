"""The whole layer: gradients, caches that cannot go stale, the local lookup, statistics hooks."""

import copy
import itertools

import pytest
import torch

from tests.unit.memory_helpers import inputs, make_layer, run

PKM = dict(
    retrieval="product-key",
    tucker_rank=1,
    num_cores=1,
    expansion=1,
    query="per-head",
    value_proj=False,
    value_dim=24,
    softmax=True,
    shuffle="none",
)


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(query="per-head-shared-sides", qk_norm="rmsnorm", candidates="two-sided"),
        dict(query="per-head", qk_norm="none", tucker_rank=3, num_cores=4, num_heads=3),
        dict(candidates="two-sided-full", shuffle="stored", expansion=9, query_conv=0),
        PKM,
    ],
    ids=["default", "shared-sides", "per-head", "two-sided-full", "pkm"],
)
def test_gradcheck(settings):
    """Analytic gradients of retrieval, expansion and scoring against finite differences."""
    layer = make_layer(knum=4, kdim=3, top_m=2, **settings).train()
    names = [name for name, _ in layer.named_parameters()]

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            pending = self.layer.start(x)
            return self.layer.finish(pending), pending.aux_loss

    both = Both()

    def function(x, *params):
        named = {f"layer.{name}": param for name, param in zip(names, params)}
        return torch.func.functional_call(both, named, (x,))

    params = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    x = inputs(1, 3).requires_grad_()
    # The selection is piecewise constant: finite differences hold while no score crosses another.
    assert torch.autograd.gradcheck(function, (x, *params), eps=1e-7, atol=1e-5, fast_mode=True)


def fresh_output(layer, x, settings):
    """What a layer built anew from the same weights gives."""
    other = make_layer(seed=99, dtype=x.dtype, **settings).eval()
    other.load_state_dict(layer.state_dict())
    with torch.no_grad():
        return run(other, x)


@pytest.mark.parametrize("settings", [{}, PKM], ids=["ultramem", "pkm"])
def test_cached_keys_cannot_go_stale(settings):
    """Without gradients keys are derived once; every way of changing weights is noticed."""
    layer, x = make_layer(**settings).eval(), inputs()
    keys, proj = layer.retrieval.keys, layer.retrieval.query.proj

    def replace_weight():
        keys.weight.data = torch.randn_like(keys.weight)

    def write_through_data():
        keys.weight.data.copy_(torch.randn_like(keys.weight))
        layer.mark_stale()

    def write_in_place():
        with torch.no_grad():
            keys.weight.mul_(torch.randn_like(keys.weight))

    def optimizer_step():
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        run(layer, x).square().sum().backward()
        optimizer.step()

    def load():
        layer.load_state_dict(make_layer(seed=3, **settings).state_dict())

    changes = [replace_weight, write_through_data, write_in_place, optimizer_step, load]
    for change in changes * 2:
        with torch.no_grad():
            before = run(layer, x)
            derived = keys._derived
            assert torch.equal(run(layer, x), before)
            assert keys._derived is derived  # the cache is in use
        change()
        with torch.no_grad():
            after = run(layer, x)
        assert not torch.allclose(after, before), change.__name__
        torch.testing.assert_close(after, fresh_output(layer, x, settings))
    assert proj.weight.grad is not None


def test_gradients_flow_after_inference():
    layer, x = make_layer().eval(), inputs()
    with torch.inference_mode():
        expected = run(layer, x)
    output = run(layer, x)
    torch.testing.assert_close(output, expected.clone())
    output.sum().backward()
    assert all(param.grad is not None for param in layer.parameters())


def test_copies_drop_derived_keys():
    layer, x = make_layer().eval(), inputs()
    with torch.no_grad():
        expected = run(layer, x)
        assert torch.equal(run(copy.deepcopy(layer), x), expected)


def test_local_lookup_accumulates_in_place():
    """fp32 tables: two backwards add up in one buffer and equal autograd's dense gradient."""
    layer, x = make_layer(dtype=torch.float32), inputs(dtype=torch.float32)
    run(layer, x).square().sum().backward()
    weight = layer.values.weight
    buffer = weight.grad
    first = buffer.clone()
    run(layer, x).square().sum().backward()
    assert weight.grad is buffer
    torch.testing.assert_close(buffer, 2 * first)
    double = make_layer()
    run(double, x.double()).square().sum().backward()
    # fp32 sums of a few hundred products against the same in float64.
    torch.testing.assert_close(first.double(), double.values.weight.grad, rtol=1e-3, atol=1e-6)


def test_no_gradient_buffer_without_training():
    layer, x = make_layer(dtype=torch.float32), inputs(dtype=torch.float32)
    with torch.no_grad():
        run(layer, x)
    assert layer.values.weight.grad is None


def test_every_parameter_is_tagged_and_gets_a_gradient():
    layer = make_layer()
    run(layer, inputs()).square().sum().backward()
    roles = {name: param.role for name, param in layer.named_parameters()}
    assert set(roles.values()) == {"matrix", "norm", "core", "table"}
    assert all(param.grad is not None and param.grad.any() for param in layer.parameters())


def test_heads_add_up():
    """With one projection and no norms between heads, H heads are the sum of single heads."""
    settings = dict(num_heads=2, query_conv=0)
    layer, x = make_layer(**settings), inputs()
    total = torch.zeros_like(x)
    for head in range(2):
        single = make_layer(**{**settings, "num_heads": 1})
        state = layer.state_dict()
        state["retrieval.keys.weight"] = state["retrieval.keys.weight"][:, head : head + 1]
        state["retrieval.form.core"] = state["retrieval.form.core"][:, head : head + 1]
        state["retrieval.form.directions"] = state["retrieval.form.directions"][:, head : head + 1]
        single.load_state_dict(state)
        total = total + run(single, x)
    torch.testing.assert_close(run(layer, x), total, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("expansion", "cores", "rank"), list(itertools.product([1, 4, 9, 16], [1, 2, 4], [1, 2]))
)
def test_table_3_configurations_train(expansion, cores, rank):
    layer = make_layer(expansion=expansion, num_cores=cores, tucker_rank=rank)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    x, target = inputs(), inputs(seed=2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (run(layer, x) - target).square().mean()
        loss.backward()
        optimizer.step()
        layer.mark_stale()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
