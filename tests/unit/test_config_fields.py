"""No flag is stored and never read: every field, perturbed, changes the model or the optimizer."""

import ast
import dataclasses
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ultramem_ds
from ultramem_ds.config.presets import preset
from ultramem_ds.config.schema import Config, MemoryConfig
from ultramem_ds.model.init import init_module
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.optim.param_groups import SCHEDULES, build_param_groups

# Memory fields -> another value. Every one changes parameters, losses or optimizer on one process.
PERTURBED = {
    "placement": "1:1/2:2",
    "knum": 7,
    "kdim": 10,
    "value_dim": 16,
    "top_m": 2,
    "num_heads": 3,
    "retrieval": "product-key",
    "tucker_rank": 3,
    "num_cores": 4,
    "expansion": 9,
    "candidates": "two-sided",
    "query": "per-head",
    "query_conv": 2,
    "query_tokens": 2,
    "qk_norm": "rmsnorm",
    "softmax": True,
    "value_proj": False,
    "shuffle": "stored",
    "init": "corrected",
    "aux_loss_weight": 0.5,
    "aux_loss_margin": 0.0,
}
# What a field needs beside it to be valid.
WITH = {
    "retrieval": dict(tucker_rank=1, num_cores=1),
    "softmax": dict(num_cores=1),
    "value_proj": dict(expansion=1, value_dim=24),
}
# Fields that change how a model runs, not what it computes: read by sharding, kernels or training,
# whose own tests show their effect. Here only: somebody reads them.
ELSEWHERE = {
    "partition",
    "shard_group_size",
    "dedup",
    "wire_dtype",
    "async_lookup",
    "kernel",
    "compile",
    "table_optimizer",
    "stats_every",
    "wire_gb_per_s",
    "memory_gb_per_s",
    "rates_file",
}

OPTIM = {
    "lr": 1.0,
    "lr_end_ratio": 0.5,
    "warmup_ratio": 0.2,
    "weight_decay": 0.2,
    "decay_norms": True,
    "value_lr_schedule": "constant",
    "value_lr_multiplier": 3.0,
    "value_weight_decay": 0.3,
    "key_lr_multiplier": 2.0,
    "query_lr_multiplier": 2.0,
    "gain_lr_multiplier": 0.5,
}


def base(**memory) -> Config:
    config = preset("ultramem-debug")
    model = replace(
        config.model, hidden_size=24, inner_size=32, num_layers=2, num_heads=2, vocab_size=31
    )
    small = dict(placement="1:2", knum=6, kdim=8, value_dim=12, top_m=4, query_conv=3)
    return replace(config, model=model, memory=replace(config.memory, **{**small, **memory}))


def signature(config: Config):
    """Parameters, losses and optimizer settings, comparable with ==."""
    model = LanguageModel(config)
    init_module(model, config, seed=0)
    tokens = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(0))
    losses = {name: value.tolist() for name, value in model.train()(tokens).items()}
    state = {
        name: (tuple(p.shape), float(p.double().sum())) for name, p in model.state_dict().items()
    }
    groups = [
        (group["name"], group["weight_decay"], group["lr"], len(group["params"]))
        for group in build_param_groups(model.named_parameters(), config.optim)
    ]
    rates = {
        name: [schedule(step, 100, config.optim) for step in (0, 5, 50)]
        for name, schedule in SCHEDULES.items()
    }
    return state, losses, groups, rates


def test_every_memory_field_is_listed():
    fields = {field.name for field in dataclasses.fields(MemoryConfig)}
    assert fields == PERTURBED.keys() | ELSEWHERE
    assert not PERTURBED.keys() & ELSEWHERE


@pytest.mark.parametrize("field", PERTURBED)
def test_memory_field_changes_the_model(field):
    beside = WITH.get(field, {})
    before = base(**beside)
    after = base(**{**beside, field: PERTURBED[field]})
    assert getattr(before.memory, field) != getattr(after.memory, field)
    assert signature(before) != signature(after)


@pytest.mark.parametrize("field", OPTIM)
def test_optimizer_field_changes_the_optimizer(field):
    config = base()
    changed = replace(config, optim=replace(config.optim, **{field: OPTIM[field]}))
    assert signature(config)[2:] != signature(changed)[2:]


def test_constant_value_lr_is_used():
    config = base()
    constant = replace(config.optim, value_lr_schedule="constant")
    rates = [SCHEDULES["tables"](50, 100, replace(constant, value_lr=lr)) for lr in (1e-3, 2e-3)]
    assert rates[1] == pytest.approx(2 * rates[0])


def attributes_read() -> set[tuple[str, str]]:
    """(what of, name) of everything that the package reads as an attribute, value checks apart.

    ``config.train.seed`` is ("train", "seed"), ``self._train.seed`` is ("train", "seed").
    """
    names = set()
    for path in Path(ultramem_ds.__file__).parent.rglob("*.py"):
        todo = [ast.parse(path.read_text())]
        while todo:
            node = todo.pop()
            if isinstance(node, ast.FunctionDef) and node.name == "__post_init__":
                continue
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                of = getattr(node.value, "attr", getattr(node.value, "id", ""))
                names.add((of.strip("_"), node.attr))
            todo += ast.iter_child_nodes(node)
    return names


def test_every_field_of_every_section_is_read():
    read = attributes_read()
    # A section is called by its name, or, handed on alone, config; inside its own class, self.
    unread = [
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(Config)
        if section.name != "preset"
        for field in dataclasses.fields(section.default_factory)
        if not {(section.name, field.name), ("config", field.name), ("self", field.name)} & read
    ]
    assert not unread
