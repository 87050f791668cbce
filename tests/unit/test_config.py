"""Presets, overrides and DeepSpeed configs: what is accepted, what is refused and how."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ultramem_ds.config.deepspeed import (
    CONFIG_DIR,
    check_stage,
    default_file,
    engine_config,
    load_deepspeed_json,
    zero_stage,
)
from ultramem_ds.config.load import changed_keys, from_dict, load_config, to_dict, valid_keys
from ultramem_ds.config.presets import PRESETS
from ultramem_ds.planning.batches import plan_batches

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_a_round_trip(name: str) -> None:
    config = load_config(name)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    check_stage(config.model.kind, zero_stage(load_deepspeed_json(None, config.model.kind)))


def test_overrides_take_their_types() -> None:
    config = load_config(
        "ultramem-debug",
        ["train.max_steps=7", "optim.lr=1e-3", "memory.softmax=false", "data.weights.docs=0.5"]
        + ["memory.candidates=two-sided", "train.micro_batch_size=auto", "data.weights.c4=1"],
    )
    assert config.train.max_steps == 7 and config.optim.lr == 1e-3
    assert config.memory.candidates == "two-sided" and config.train.micro_batch_size == "auto"
    assert config.data.weights == {"docs": 0.5, "c4": 1.0}


@pytest.mark.parametrize(
    ("preset", "override", "words"),
    [
        ("ultramem-debgu", "", ["ultramem-debgu", "ultramem-debug"]),
        ("dense-debug", "train.max_step=3", ["train.max_step", "train.max_steps"]),
        ("dense-debug", "trian.max_steps=3", ["trian.max_steps", "train.max_steps"]),
        ("dense-debug", "train.max_steps", ["section.key=value"]),
        ("dense-debug", "train.max_steps=many", ["train.max_steps", "integer"]),
        ("dense-debug", "train.max_steps=0", ["train.max_steps", "at least 1"]),
        ("dense-debug", "train.precision=fp8", ["train.precision", "fp32", "bf16"]),
        ("dense-debug", "model.dropout=1.5", ["model.dropout"]),
        ("dense-debug", "model.num_heads=3", ["model.hidden_size=128", "model.num_heads=3"]),
        ("ultramem-debug", "memory.expansion=3", ["memory.expansion=3", "perfect square"]),
        ("ultramem-debug", "memory.placement=3-5", ["memory.placement", "a:b"]),
        ("ultramem-debug", "memory.placement=3:9", ["block 9", "model.num_layers=4"]),
        ("ultramem-debug", "memory.candidates=both", ["memory.candidates", "two-sided"]),
        ("ultramem-debug", "memory.partition=row-wise", ["memory.partition", "number-wise"]),
        ("ultramem-debug", "memory.top_m=100000", ["memory.top_m", "keys per side"]),
        ("ultramem-debug", "data.weights.c4=-1", ["data.weights.c4"]),
        ("moe-debug", "moe.top_k=3", ["moe.top_k"]),
    ],
)
def test_bad_values_are_named(preset: str, override: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        load_config(preset, [override] if override else [])
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_changed_keys_are_found() -> None:
    old = load_config("dense-debug")
    new = load_config("dense-debug", ["optim.lr=1.0", "train.seed=3"])
    assert changed_keys(old, new) == ["optim.lr", "train.seed"]
    assert changed_keys(old, old) == []
    assert "train.stop_at_step" in valid_keys()


@pytest.mark.parametrize("path", sorted(CONFIG_DIR.glob("*.json")), ids=lambda p: p.stem)
def test_shipped_deepspeed_configs(path: Path) -> None:
    kind = {"dense": "dense", "moe": "moe"}.get(path.stem.split("_")[0], "ultramem")
    config = load_config(f"{kind}-debug")
    values = load_deepspeed_json(path, config.model.kind)
    check_stage(config.model.kind, zero_stage(values))
    filled = engine_config(values, config, plan_batches(config, 2))
    assert filled["gradient_clipping"] == 0.0  # the gate clips, to optim.clip_grad
    assert (
        filled["train_micro_batch_size_per_gpu"] * filled["gradient_accumulation_steps"] * 2
        == filled["train_batch_size"]
        == config.train.global_batch_size
    )
    assert not filled["bf16"]["enabled"]


def test_every_needed_deepspeed_config_is_shipped() -> None:
    names = {path.stem for path in CONFIG_DIR.glob("*.json")}
    assert names >= {
        "dense_zero1", "dense_zero2", "dense_zero3", "ultramem_zero3", "ultramem_zero3_cpu_offload",
        "ultramem_zero3_nvme_offload", "moe_zero1", "moe_zero2", "cpu_debug",
    }  # fmt: skip
    for kind in ("dense", "pkm", "moe", "ultramem"):
        assert default_file(kind).exists()


def test_moe_under_zero3_is_refused_with_an_alternative() -> None:
    with pytest.raises(ValueError, match=r"ds_configs/moe_zero2\.json"):
        check_stage("moe", 3)
    with pytest.raises(ValueError, match=r"ds_configs/ultramem_zero3\.json"):
        check_stage("ultramem", 2)


def test_batches_divide_or_are_refused() -> None:
    config = load_config("dense-debug", ["train.micro_batch_size=4"])
    assert plan_batches(config, 2).accumulation_steps == 2
    with pytest.raises(ValueError, match="16 cannot be divided over 3 ranks"):
        plan_batches(config, 3)
    with pytest.raises(ValueError, match="train.micro_batch_size=4 does not divide"):
        plan_batches(config, 8)
    auto = plan_batches(load_config("dense-debug"), 1)
    assert auto.micro_batch_size * auto.accumulation_steps == 16


def test_contradictions_of_the_deepspeed_json_are_refused() -> None:
    config = load_config("dense-debug", ["train.micro_batch_size=4"])
    batches = plan_batches(config, 2)
    with pytest.raises(ValueError, match="train_batch_size=99"):
        engine_config({"train_batch_size": 99}, config, batches)
    with pytest.raises(ValueError, match="'optimizer'"):
        engine_config({"optimizer": {"type": "Adam"}}, config, batches)
    assert engine_config({"train_batch_size": "auto"}, config, batches)["train_batch_size"] == 16
