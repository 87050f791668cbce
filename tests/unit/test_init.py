"""Initialisation: any split of a table, any order of parameters, the recipes' targets."""

import math
from dataclasses import replace

import pytest
import torch

from tests.unit.memory_helpers import make_config, make_layer
from ultramem_ds.config.load import load_config
from ultramem_ds.config.presets import preset
from ultramem_ds.model.init import (
    INITIALISERS,
    TABLE_BLOCK_ROWS,
    fill_rows,
    gaussian_top_mean,
    init_module,
    init_parameter,
    score_moments,
)
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.model.memory.layer import MemoryLayer
from ultramem_ds.model.memory.lookup import ValueTable


def filled(num_rows, width, config, first_row, seed=3, table=1):
    out = torch.empty(num_rows, width)
    fill_rows(out, config, seed, table, first_row)
    return out


def test_rows_do_not_depend_on_the_split():
    config, rows, width = make_config(), TABLE_BLOCK_ROWS * 2 + 100, 12
    whole = filled(rows, width, config, 0)
    for cut in (1, 4095, 4096, 4097, 8192, rows - 1):
        parts = [filled(cut, width, config, 0), filled(rows - cut, width, config, cut)]
        assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(filled(rows, width, config, 0, seed=4), whole)
    assert not torch.equal(filled(rows, width, config, 0, table=2), whole)
    assert whole[:4096].unique(dim=0).shape[0] == 4096
    std = INITIALISERS["table"](config).std
    # 10^5 samples: standard error 0.22%.
    assert whole.std().item() == pytest.approx(std, rel=0.01)


def test_a_parameter_depends_on_seed_and_name_only():
    config = preset("ultramem-debug")
    first, second = LanguageModel(config), LanguageModel(config)
    init_module(first, config, seed=1)
    named = list(second.named_parameters())
    for name, param in reversed(named):
        init_parameter(name, param, config, seed=1)
    for (name, ours), (_, theirs) in zip(first.named_parameters(), named):
        assert torch.equal(ours, theirs), name
    matrices = [
        p.detach()
        for name, p in first.named_parameters()
        if p.role == "matrix" and p.dim() == 2 and ".conv." not in name
    ]
    assert len({float(p.flatten()[0]) for p in matrices}) == len(matrices)


def test_standard_deviations_of_a_model():
    config = preset("ultramem-debug")
    model = LanguageModel(config)
    init_module(model, config, seed=0)
    matrix = config.model.init_std
    residual = matrix / math.sqrt(2 * 4)
    assert model.embedding.weight.std().item() == pytest.approx(1.0, rel=0.02)
    for block in model.blocks:
        assert block.attention.out_proj.weight.std().item() == pytest.approx(residual, rel=0.05)
        assert block.mlp.down_proj.weight.std().item() == pytest.approx(residual, rel=0.05)
        assert block.attention.qkv_proj.weight.std().item() == pytest.approx(matrix, rel=0.05)
        assert (block.mlp_norm.weight == 1).all()
    memory, layer = config.memory, model.memories[0]
    table_std = math.sqrt(memory.expansion / (2 * memory.top_m * memory.num_heads * 4))
    assert layer.values.weight.std().item() == pytest.approx(table_std, rel=0.01)
    assert (layer.retrieval.keys.norm.weight == memory.kdim**-0.5).all()
    mean = gaussian_top_mean(memory.num_slots, memory.top_m)
    torch.testing.assert_close(
        layer.retrieval.query.norm.weight.detach(), torch.full((memory.kdim,), mean**-0.5)
    )


def test_untagged_parameters_are_refused():
    with pytest.raises(ValueError, match="no line in INITIALISERS"):
        init_parameter("stray", torch.nn.Parameter(torch.zeros(2)), make_config(), 0)


@pytest.mark.parametrize(("num", "top_m"), [(400, 4), (10_000, 16), (10_000, 100)])
def test_gaussian_top_mean_by_brute_force(num, top_m):
    generator = torch.Generator().manual_seed(1)
    samples = torch.randn(400, num, generator=generator).topk(top_m).values.mean()
    # Both sides are means of some hundred draws.
    assert gaussian_top_mean(num, top_m) == pytest.approx(float(samples), rel=0.01)


def measure(config, num_layers=8):
    """Mean selected score and output variance over 1/(2L), over freshly built layers."""
    totals, variances = [], []
    for index in range(num_layers):
        table = ValueTable(config.memory.num_rows, config.memory.value_dim, table_index=0)
        layer = MemoryLayer(config.model, config.memory, table)
        init_module(layer, config, seed=index)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(index)
            x = torch.randn(1, 256, config.model.hidden_size, generator=generator)
            pending = layer.eval().start(x)
            output = layer.finish(pending)
        totals.append(pending.selection.scores_TKh.sum(-1).mean())
        variances.append(output.var() * 2 * config.model.num_layers)
    return float(torch.stack(totals).mean()), float(torch.stack(variances).mean())


REDUCED = dict(knum=48, kdim=32, value_dim=64)


@pytest.mark.parametrize(
    "change",
    [
        dict(),
        dict(num_cores=1),
        dict(num_cores=4),
        dict(tucker_rank=3, expansion=1),
        dict(candidates="two-sided-full", num_heads=4),
        dict(retrieval="product-key", tucker_rank=1, num_cores=1),
        dict(qk_norm="none"),
    ],
    ids=lambda change: ",".join(f"{k}={v}" for k, v in change.items()) or "default",
)
def test_corrected_recipe_meets_its_target(change):
    base = preset("ultramem-151m-x12")
    model = replace(base.model, hidden_size=128, num_heads=2, dropout=0.0)
    memory = replace(base.memory, **{**REDUCED, "init": "corrected", **change})
    config = replace(base, model=model, memory=memory)
    mean, variance = measure(config)
    # 8 layers of 2-4 random cores: the sample over cores is what spreads.
    assert mean == pytest.approx(1.0, abs=0.15)
    assert variance == pytest.approx(1.0, abs=0.3)


def test_paper_recipe_falls_short_by_the_cores():
    """With h cores each chunk sees about 1/h of the score: the variance falls as 1/h^2."""
    moments = {
        h: score_moments(make_config(num_cores=h, init="corrected").memory).core_square
        for h in (1, 2, 4)
    }
    assert moments[1] > 1.0
    assert moments[2] < 0.8 * moments[1]
    assert moments[4] < 0.6 * moments[1]


def test_layers_start_different_but_reproducible():
    first, second, third = make_layer(seed=0), make_layer(seed=0), make_layer(seed=1)
    for name, param in first.named_parameters():
        assert torch.equal(param, second.get_parameter(name))
        if param.role != "norm" and ".conv." not in name:
            assert not torch.equal(param, third.get_parameter(name))


def test_the_query_convolution_may_start_with_the_tokens_before():
    config = load_config("ultramem-debug", ["memory.query_tokens=1/3"])
    model = LanguageModel(config)
    init_module(model, config, seed=0)
    one, three = (layer.retrieval.query.conv for layer in model.memory_layers)
    x = torch.randn(2, 9, config.model.hidden_size)
    torch.testing.assert_close(one(x, None, None)[0], x)
    signs = three.weight.detach()[-3:-1]
    assert set(signs.flatten().tolist()) == {-1.0, 1.0}
    before = [torch.cat([torch.zeros(2, k, x.shape[2]), x[:, :-k]], dim=1) for k in (2, 1)]
    expected = x + signs[0] * before[0] + signs[1] * before[1]
    torch.testing.assert_close(three(x, None, None)[0], expected)


def test_the_query_convolution_starts_as_the_identity():
    convolution = make_layer(query_conv=4).retrieval.query.conv
    x = torch.randn(2, 9, convolution.weight.shape[1])
    assert torch.equal(convolution(x, None, None)[0], x)
