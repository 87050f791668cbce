"""Schedules against hand-computed values; groups disjoint and complete."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ultramem_ds.config.load import load_config
from ultramem_ds.config.schema import OptimConfig
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.optim.param_groups import SCHEDULES, build_param_groups
from ultramem_ds.optim.schedule import dense_lr, value_lr


def test_dense_schedule_warms_up_and_ends_at_a_tenth() -> None:
    optim = OptimConfig(lr=1.0, warmup_ratio=0.1)
    rates = [dense_lr(step, 100, optim) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert rates[100] == pytest.approx(0.1)
    assert all(b < a for a, b in zip(rates[10:], rates[11:]))


def test_value_schedules() -> None:
    decay = OptimConfig(lr=1.0, warmup_ratio=0.0, value_lr_multiplier=10.0)
    for step in (0, 30, 100):
        expected = dense_lr(step, 100, decay) * (1 + 9 * (1 - step / 100))
        assert value_lr(step, 100, decay) == pytest.approx(expected)
    constant = OptimConfig(value_lr_schedule="constant", value_lr=0.25)
    assert {value_lr(step, 100, constant) for step in (0, 50, 100)} == {0.25}


@pytest.mark.parametrize("kind", ["dense", "pkm", "moe", "ultramem"])
def test_groups_are_disjoint_and_complete(kind: str) -> None:
    config = load_config(f"{kind}-debug")
    with torch.device("meta"):
        model = LanguageModel(config)
    groups = build_param_groups(model.named_parameters(), config.optim)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters()}
    names = [group["name"] for group in groups]
    assert ("tables" in names) == (kind in ("pkm", "ultramem"))
    decays = {group["name"]: group["weight_decay"] for group in groups}
    assert decays["matrices"] == 0.1 and decays["norms"] == 0.0


def test_keys_gains_and_tables_may_have_rates_and_decays_of_their_own() -> None:
    config = load_config(
        "ultramem-debug",
        [
            "optim.key_lr_multiplier=3",
            "optim.query_lr_multiplier=0.5",
            "optim.gain_lr_multiplier=0.1",
            "optim.value_weight_decay=0",
        ],
    )
    with torch.device("meta"):
        model = LanguageModel(config)
    groups = build_param_groups(model.named_parameters(), config.optim)
    by_name = {group["name"]: group for group in groups}
    keys = [memory.retrieval.keys.weight for memory in model.memory_layers]
    assert [id(p) for p in by_name["keys"]["params"]] == [id(p) for p in keys]
    retrievals = [memory.retrieval for memory in model.memory_layers]
    queries = [w for each in retrievals for w in (each.query.proj.weight, each.query.conv.weight)]
    assert {id(p) for p in by_name["queries"]["params"]} == {id(p) for p in queries}
    gains = [norm.weight for each in retrievals for norm in (each.query.norm, each.keys.norm)]
    assert {id(p) for p in by_name["gains"]["params"]} == {id(p) for p in gains}
    assert {name: group["weight_decay"] for name, group in by_name.items()} == {
        "matrices": 0.1,
        "keys": 0.1,
        "queries": 0.1,
        "norms": 0.0,
        "gains": 0.0,
        "tables": 0.0,
    }
    for step in (0, 50, 199):
        rates = {name: SCHEDULES[name](step, 200, config.optim) for name in by_name}
        assert rates["keys"] == pytest.approx(3 * rates["matrices"])
        assert rates["gains"] == pytest.approx(0.1 * rates["norms"])
    plain = build_param_groups(model.named_parameters(), load_config("ultramem-debug").optim)
    assert [group["name"] for group in plain] == ["matrices", "norms", "tables"]


def test_untagged_and_shared_parameters_are_errors() -> None:
    loose = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="has role None"):
        build_param_groups(loose.named_parameters(), OptimConfig())
    loose.weight.role = "matrix"  # type: ignore[assignment]
    twice = [("a", loose.weight), ("b", loose.weight)]
    with pytest.raises(ValueError, match="b is also a"):
        build_param_groups(twice, OptimConfig())
