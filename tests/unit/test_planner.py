"""The planner's choice, memory and JSON."""

import json

import pytest

from ultramem_ds.cli.main import main
from ultramem_ds.config.load import load_config
from ultramem_ds.planning.planner import make_plan, resolve_partition
from ultramem_ds.sharding.table_plan import SCHEMES


def test_auto_takes_the_least_predicted_time():
    config = load_config("ultramem-1.6b-x12", ["memory.wire_dtype=bf16"])
    for world_size in (2, 8, 64, 512):
        plan = make_plan(config, world_size)
        times = {scheme.scheme: scheme.predicted_step_ms for scheme in plan.schemes}
        assert plan.partition == min(times, key=times.get) == resolve_partition(config, world_size)
    # All-gathering scores to 512 ranks costs more than it saves; to 64 it does not.
    assert resolve_partition(config, 64) == "dimension-wise"
    assert resolve_partition(config, 512) == "owner-pooled"


def test_auto_weighs_wire_against_memory():
    """On 16 ranks fragments of 4 columns waste three quarters of each cache line read."""
    layer = ["memory.value_dim=64", "memory.wire_dtype=fp32"]
    slow_wire = load_config("ultramem-debug", [*layer, "memory.wire_gb_per_s=0.1"])
    slow_memory = load_config(
        "ultramem-debug",
        [*layer, "memory.wire_gb_per_s=1000", "memory.memory_gb_per_s=1"],
    )
    assert resolve_partition(slow_wire, 16) == "dimension-wise"
    assert resolve_partition(slow_memory, 16) != "dimension-wise"


def test_a_scheme_asked_for_is_kept_or_refused():
    config = load_config("ultramem-debug", ["memory.partition=number-wise"])
    assert resolve_partition(config, 8) == "number-wise"
    config = load_config("ultramem-debug", ["memory.partition=dimension-wise"])
    with pytest.raises(ValueError, match=r"memory\.value_dim=64 divisible by the 3 ranks"):
        resolve_partition(config, 3)


def test_an_impossible_scheme_is_not_chosen():
    config = load_config("ultramem-debug", ["train.global_batch_size=3"])
    plan = make_plan(config, 3)
    obstacles = {scheme.scheme: bool(scheme.obstacle) for scheme in plan.schemes}
    assert obstacles == {name: name == "dimension-wise" for name in SCHEMES}
    assert plan.partition != "dimension-wise"


def test_sub_groups_trade_memory_for_bytes():
    whole = make_plan(load_config("ultramem-debug"), 4)
    halves = make_plan(load_config("ultramem-debug", ["memory.shard_group_size=2"]), 4)
    tables = 2 * 192 * 192 * 64 * 4  # two tables in fp32
    assert halves.memory.weights - whole.memory.weights == tables // 4
    assert halves.memory.optimizer - whole.memory.optimizer == 3 * tables // 4
    assert whole.replica_bytes_per_optimizer_step == 0
    # A ring all-reduce over two copies of half the tables: 2 (2 - 1) / 2 of tables / 2.
    assert halves.replica_bytes_per_optimizer_step == tables / 2
    for narrow, wide in zip(halves.schemes, whole.schemes):
        assert narrow.bytes_per_step < wide.bytes_per_step
    with pytest.raises(ValueError, match=r"memory\.shard_group_size=3 must divide the 4"):
        make_plan(load_config("ultramem-debug", ["memory.shard_group_size=3"]), 4)


def test_table_gradients_are_held_twice_or_not_at_all():
    """fp32, where lookups add and in ZeRO's own buffer; a row-sparse optimizer keeps neither."""
    config = load_config("ultramem-debug")
    memory = config.memory
    per_rank = len(memory.spans) * memory.num_rows * memory.value_dim // 2
    dense = make_plan(config, 2).memory.gradients
    sparse = load_config("ultramem-debug", ["memory.table_optimizer=row-sparse"])
    assert dense - make_plan(sparse, 2).memory.gradients == 8 * per_rank


def test_one_rank_sends_nothing():
    plan = make_plan(load_config("ultramem-debug"), 1)
    assert [scheme.bytes_per_step for scheme in plan.schemes] == [0, 0, 0]


@pytest.mark.parametrize("preset", ["dense-debug", "moe-debug", "pkm-debug", "ultramem-1.6b-x12"])
def test_plan_verb_prints_one_json_document(preset, capsys):
    assert (
        main(["plan", "--preset", preset, "--world-size", "4", "--micro-batch", "2", "--json"]) == 0
    )
    plan = json.loads(capsys.readouterr().out)
    assert plan["micro_batch_size"] == 2
    parts = ("weights", "gradients", "optimizer", "activations")
    assert plan["memory"]["total"] == sum(plan["memory"][part] for part in parts)
    has_memory = preset.startswith(("pkm", "ultramem"))
    assert [scheme["scheme"] for scheme in plan["schemes"]] == (list(SCHEMES) if has_memory else [])


def test_plan_verb_names_the_chosen_scheme(capsys):
    assert main(["plan", "--preset", "ultramem-debug", "--world-size", "2"]) == 0
    assert "<- chosen" in capsys.readouterr().out


def test_plan_verb_refuses_nonsense(capsys):
    assert main(["plan", "--preset", "ultramem-debug", "--world-size", "0"]) == 2
    assert "--world-size 0 must be at least 1" in capsys.readouterr().err
