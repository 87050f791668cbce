"""Training-state statistics against direct computations."""

import math

import pytest
import torch

from tests.unit.memory_helpers import MEMORY, inputs, make_layer, run
from ultramem_ds.model.memory import stats
from ultramem_ds.model.memory.stats import StatsWindow, UsageCounter, touched_share, usage_kl
from ultramem_ds.telemetry.update_sizes import MAX_ELEMENTS, UpdateSizes


def test_numbers_of_one_window():
    layer = make_layer(dtype=torch.float32).train()
    window = StatsWindow(MEMORY, 1, torch.device("cpu"))
    layer.observer = window.layers[0]
    x1, x2 = (inputs(seed=seed, dtype=torch.float32) for seed in (1, 2))
    first = layer.start(x1)
    layer.finish(first)
    window.sample()
    second = layer.start(x2)
    residual = 3 * inputs(seed=4, dtype=torch.float32)
    output = layer.finish(second, residual)
    run(layer.eval(), inputs(seed=3, dtype=torch.float32))  # evaluation is not counted
    numbers = window.summaries(window.tensors())
    totals = second.selection.scores_TKh.sum(-1).view(10, 2, 4)
    expected = {
        "layer_0/top1_score": totals[..., 0].mean(),
        "layer_0/last_score": totals[..., -1].mean(),
        "layer_0/output_std": output.std(correction=0),
        "layer_0/output_share": output.square().mean().sqrt() / residual.square().mean().sqrt(),
        "layer_0/aux_loss": second.aux_loss,
        "layer_0/recall": second.selection.diagnosis.recall,
    }
    for name, value in expected.items():
        assert numbers[name] == pytest.approx(float(value), rel=1e-5), name
    sigma = torch.linalg.svdvals(layer.retrieval.form.core.detach().sum(0)).mean(0)
    assert numbers["layer_0/singular_value_1"] == pytest.approx(float(sigma[0]), rel=1e-5)
    assert numbers["layer_0/singular_value_2"] == pytest.approx(float(sigma[1]), rel=1e-5)
    rows = torch.cat([first.rows_TK, second.rows_TK]).flatten().bincount(minlength=36)
    slots = torch.cat([first.permuted_TK, second.permuted_TK]).flatten().bincount(minlength=144)
    assert numbers["layer_0/rows_touched"] == float((rows > 0).sum()) / 36
    assert numbers["layer_0/slots_touched"] == float((slots > 0).sum()) / 144
    share = rows[rows > 0] / rows.sum()
    assert numbers["layer_0/rows_kl"] == pytest.approx(
        float((share * (share * 36).log()).sum()), rel=1e-5
    )
    window.reset()
    assert window.summaries(window.tensors())["layer_0/rows_touched"] == 0


def test_sums_over_ranks_are_the_whole_batch():
    """Two half batches, summed, give the numbers of the whole batch."""
    x = inputs(4, 6, dtype=torch.float32)

    def tensors(parts):
        packed = []
        for part in parts:
            layer = make_layer(dtype=torch.float32, query_conv=0).train()
            window = StatsWindow(MEMORY, 1, torch.device("cpu"))
            layer.observer = window.layers[0]
            window.sample()
            run(layer, part)
            packed.append(window.tensors())
        return window.summaries([sum(pair) for pair in zip(*packed)])

    whole, halves = tensors([x]), tensors(x.chunk(2))
    for name in whole.keys() - {"layer_0/recall"}:  # recall samples other tokens
        assert halves[name] == pytest.approx(whole[name], rel=1e-5), name


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(stats, "MAX_BUCKETS", 1 << 12)
    counter = UsageCounter(1 << 20, torch.device("cpu"))
    assert counter.counts.numel() == 1 << 12
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1 << 20, (6000,), generator=generator)
    counter.add(ids)
    exact = ids.unique().numel() / (1 << 20)
    # Linear counting at load 1.5: standard error about 1.5%.
    assert touched_share(counter.counts, 1 << 20) == pytest.approx(exact, rel=0.06)


def test_kl_of_known_usages():
    assert usage_kl(torch.full((8,), 5, dtype=torch.int32)) == pytest.approx(0.0, abs=1e-12)
    one_hot = torch.tensor([7, 0, 0, 0], dtype=torch.int32)
    assert usage_kl(one_hot) == pytest.approx(math.log(4))
    assert usage_kl(torch.zeros(4, dtype=torch.int32)) == 0.0


def test_a_collapsed_layer_is_counted_beyond_31_bits() -> None:
    """2 ranks with 3e9 uses of one slot each: the paper's batch, every token at one place."""
    counter = UsageCounter(4, torch.device("cpu"))
    counter.counts[1] = 3_000_000_000
    counter.add(torch.tensor([1, 1, 2]))
    both = counter.counts * 2  # as summed over ranks
    assert both.tolist() == [0, 6_000_000_004, 2, 0]
    assert touched_share(both, 4) == 0.5
    assert usage_kl(both) == pytest.approx(math.log(4), rel=1e-6)


def test_update_sizes_are_those_of_the_tensor():
    """On a tensor looked at in full exactly; on a larger one by every 17th element within 2%."""
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(7, 5, generator=generator)
    large = torch.randn(16 * MAX_ELEMENTS // 64, 64, generator=generator)
    sizes = UpdateSizes({"a": lambda: small, "b": lambda: large})
    before = {"a": small.clone(), "b": large.clone()}
    sizes.before_step()
    small[2] += 1.0
    large *= 1 + 0.1 * (torch.arange(64) % 4 == 0)  # a column pattern that an even stride misses
    numbers = sizes.numbers(sizes.sums(torch.device("cpu")))
    for name, now, tolerance in (("a", small, 1e-6), ("b", large, 0.02)):
        rms = now.square().mean().sqrt()
        change = (now - before[name]).square().mean().sqrt()
        assert numbers[f"{name}_rms"] == pytest.approx(float(rms), rel=tolerance)
        assert numbers[f"{name}_update"] == pytest.approx(float(change / rms), rel=tolerance)
