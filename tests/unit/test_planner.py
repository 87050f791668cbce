"""The planner's choice, memory and JSON."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ultramem_ds.cli.main import main
from ultramem_ds.config.deepspeed import kept_from_offload, load_deepspeed_json
from ultramem_ds.config.load import load_config
from ultramem_ds.config.presets import PRESETS, preset
from ultramem_ds.model.accounting import count
from ultramem_ds.planning.costs import distinct_rows
from ultramem_ds.planning.crossover import RANKS, WIDTHS, byte_ratio
from ultramem_ds.planning.experts import expert_layout
from ultramem_ds.planning.planner import make_plan, resolve_partition
from ultramem_ds.sharding.table_plan import SCHEMES
from ultramem_ds.train.fitting import device_bytes


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
    # Two moments: under ZeRO-3 fp32 weights are their own masters.
    assert halves.memory.optimizer - whole.memory.optimizer == 2 * tables // 4
    assert whole.replica_bytes_per_optimizer_step == 0
    # A ring all-reduce over two copies of half the tables: 2 (2 - 1) / 2 of tables / 2.
    assert halves.replica_bytes_per_optimizer_step == tables / 2
    for narrow, wide in zip(halves.schemes, whole.schemes):
        assert narrow.bytes_per_step < wide.bytes_per_step
    with pytest.raises(ValueError, match=r"memory\.shard_group_size=3 must divide the 4"):
        make_plan(load_config("ultramem-debug", ["memory.shard_group_size=3"]), 4)


def test_table_gradients_are_held_whole_or_by_row():
    """fp32, of every row in ZeRO's own buffer; of a row-sparse optimizer's touched rows."""
    dense = ["memory.table_optimizer=dense", "memory.knum=3000"]
    sparse = ["memory.table_optimizer=row-sparse", *dense[1:]]
    memory = load_config("ultramem-debug", dense).memory
    row = len(memory.spans) * memory.value_dim // 2  # one row of each table, over two ranks
    nothing = make_plan(load_config("ultramem-debug", dense), 2).memory.gradients
    nothing -= 4 * row * memory.num_rows
    assert nothing > 0

    def of_rows(sequences):
        batch = [f"train.global_batch_size={sequences}", "train.micro_batch_size=1"]
        plan = make_plan(load_config("ultramem-debug", [*sparse, *batch]), 2)
        return plan.memory.gradients - nothing

    # One micro-batch of 2 x 128 tokens looks up 4096 rows of 9 million: gradients and values.
    once = distinct_rows(2 * 128 * memory.rows_per_token, memory.num_rows)
    assert of_rows(2) == pytest.approx(row * once * (2 * 4 + 4), rel=1e-3)
    # Two of them: the sum has room for twice its rows. Very many: for every row, no more.
    assert of_rows(4) == pytest.approx(row * once * (4 * 4 + 4 + 4), rel=1e-2)
    assert of_rows(1 << 20) == pytest.approx(row * (4 * memory.num_rows + 8 * once), rel=1e-3)


@pytest.mark.parametrize(("precision", "per_value"), [("fp32", 8), ("bf16", 12)])
def test_offload_leaves_row_sparse_tables_where_they_are(precision, per_value):
    """Two moments, and a master beside bf16 values, of every row; DeepSpeed holds none of them."""
    offload = load_deepspeed_json(Path("ultramem_zero3_cpu_offload.json"), "ultramem")
    names = {"dense": 0, "row-sparse": 2 * 192 * 192 * 64 * per_value // 2}  # two tables, two ranks
    for optimizer, own in names.items():
        overrides = [f"memory.table_optimizer={optimizer}", f"train.precision={precision}"]
        config = load_config("ultramem-debug", overrides)
        plan = make_plan(config, 2, offload)
        assert plan.own_optimizer_bytes == own
        everything = plan.memory.total
        assert device_bytes(plan, offload, on_gpu=False) == everything
        assert device_bytes(plan, offload, on_gpu=True) == everything - plan.memory.optimizer + own
        said = kept_from_offload(offload, config)
        assert bool(said) == bool(own) and (not own or f"table_optimizer={optimizer}" in said)
        assert kept_from_offload({}, config) == ""
    dense = load_config("dense-debug", ["memory.table_optimizer=row-sparse"])
    assert kept_from_offload(offload, dense) == "" and make_plan(dense, 2).own_optimizer_bytes == 0


def test_the_wire_follows_the_precision():
    """auto is the table's dtype; asking for one of them is to keep it."""

    def sent(*overrides):
        return {s.scheme: s.bytes_per_step for s in make_plan(load(*overrides), 4).schemes}

    def load(*overrides):
        return load_config("ultramem-debug", overrides)

    for precision in ("fp32", "bf16"):
        auto = sent(f"train.precision={precision}")
        assert auto == sent(f"train.precision={precision}", f"memory.wire_dtype={precision}")
    assert sent("train.precision=bf16")["number-wise"] < 0.6 * sent()["number-wise"]


@pytest.mark.parametrize("world_size", [8, 16, 64])
@pytest.mark.parametrize("preset", [name for name in PRESETS if "debug" not in name])
def test_every_paper_preset_has_a_plan(preset, world_size):
    """33 and 34 experts divide by nothing useful: they are padded, counted as what they take."""
    config = load_config(preset)
    plan = make_plan(config, world_size)
    if config.model.kind != "moe":
        assert plan.padding_experts == 0
        return
    layout = expert_layout(config, world_size)
    assert plan.padding_experts == layout.num_slots - config.moe.num_experts < layout.group_size
    per_expert = 2 * config.model.hidden_size * config.model.inner_size * config.model.num_layers
    weights = 2 * layout.slots_per_rank * per_expert
    assert (
        0
        < plan.memory.weights - weights
        == 2
        * (
            count(config).dense_params
            + count(config).norm_params
            + 2 * config.model.vocab_size * config.model.hidden_size
        )
    )


def test_experts_lie_on_as_few_ranks_as_leave_each_the_fewest():
    def layout(experts, world_size, size=0):
        overrides = [f"moe.num_experts={experts}", f"moe.expert_parallel_size={size}"]
        found = expert_layout(load_config("moe-debug", overrides), world_size)
        return found.group_size, found.slots_per_rank, found.padding

    assert layout(32, 64) == (32, 1, 0)
    assert layout(33, 8) == (8, 5, 7)
    assert layout(34, 16) == (16, 3, 14)
    assert layout(33, 64) == (64, 1, 31)
    assert layout(16, 3) == (3, 6, 2)
    assert layout(34, 64, 2) == (2, 17, 0)
    with pytest.raises(ValueError, match=r"expert_parallel_size=3 does not divide the 8 ranks"):
        layout(33, 8, 3)


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
    parts = ("weights", "gradients", "optimizer", "activations", "buffers", "process")
    assert plan["memory"]["total"] == sum(plan["memory"][part] for part in parts)
    has_memory = preset.startswith(("pkm", "ultramem"))
    assert [scheme["scheme"] for scheme in plan["schemes"]] == (list(SCHEMES) if has_memory else [])


def test_plan_verb_names_the_chosen_scheme(capsys):
    assert main(["plan", "--preset", "ultramem-debug", "--world-size", "2"]) == 0
    assert "<- chosen" in capsys.readouterr().out


def test_plan_verb_refuses_nonsense(capsys):
    assert main(["plan", "--preset", "ultramem-debug", "--world-size", "0"]) == 2
    assert "--world-size 0 must be at least 1" in capsys.readouterr().err


def test_figure_9(tmp_path):
    """The formulas of App. D but for the counts of a 2,048-token exchange (0.1%)."""
    memory = replace(preset("ultramem-151m-x12").memory, wire_dtype="bf16")
    rows = memory.rows_per_token
    ratio = byte_ratio(replace(memory, expansion=1, num_cores=1))
    for i, width in enumerate(WIDTHS):
        for j, ranks in enumerate(RANKS):
            number = 4 * rows + 2 * rows * width
            dimension = 6 * rows * ranks + 2 * width
            assert ratio[i, j] == pytest.approx(number / dimension, rel=2e-3)
    # With expansion and cores it falls to P of about 112 at the preset's width.
    row = byte_ratio(memory)[abs(WIDTHS - 512).argmin()]
    assert 95 < RANKS[abs(row - 1).argmin()] < 125
    figure = tmp_path / "figure-9.png"
    arguments = ["plan", "--preset", "ultramem-151m-x12", "--world-size", "8", "--figure"]
    assert main([*arguments, str(figure)]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert main([*arguments, str(tmp_path / "a.pdf")]) == 2
    assert main(["plan", "--preset", "dense-debug", "--world-size", "2", "--figure", "a.png"]) == 2
