"""TensorBoard's files: what a reader finds there, and what a restart leaves of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from ultramem_ds.config.load import load_config
from ultramem_ds.telemetry.board import Board, hyper_parameters, scalars
from ultramem_ds.telemetry.metrics import MetricsWriter


def read(directory: Path) -> EventAccumulator:
    board = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    board.Reload()
    return board


def test_keys_find_their_groups_and_units() -> None:
    tagged = scalars(
        {
            "step": 3,
            "loss": 2.5,
            "lr_values": None,
            "step_time_s": 0.25,
            "time_s/lookup": 0.125,
            "wire_bytes/ids": 2_000_000.0,
            "data/c4": 0.5,
            "layer_1/recall": 0.75,
            "expert_share": [[0.5, 0.25, 0.25, 0.0], [0.0, 0.25, 0.25, 0.5]],
            "bad_steps": 1,
            "skipped": "loss not finite",
        }
    )
    assert tagged == {
        "1_loss/train": 2.5,
        "3_throughput/step_ms": 250.0,
        "4_time_ms/lookup": 125.0,
        "8_wire_mb/ids": 2.0,
        "9_data_share/c4": 0.5,
        "7_memory_layers/recall/layer_1": 0.75,
        "7_expert_load/busiest/block_0": 2.0,
        "7_expert_load/idlest/block_0": 0.0,
        "7_expert_load/busiest/block_1": 2.0,
        "7_expert_load/idlest/block_1": 0.0,
        **{f"7_expert_load/expert_0{i}": 1.0 for i in range(4)},
        "9_guards/bad_steps": 1,
    }


def test_each_expert_s_load_over_the_mean() -> None:
    tagged = scalars({"step": 1, "expert_share": [[0.75, 0.25], [0.25, 0.75], [1.0, 0.0]]})
    assert tagged["7_expert_load/expert_00"] == pytest.approx(2.0 / 1.5)
    assert tagged["7_expert_load/expert_01"] == pytest.approx(1.0 / 1.5)


def test_validation_has_its_perplexity_by_subset(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 1)
    writer.write_validation(5, {"c4": 2.0, "all": 1e3})
    writer.close()
    board = read(tmp_path / "tensorboard")
    (event,) = board.Scalars("2_validation_perplexity/c4")
    assert (event.step, event.value) == (5, pytest.approx(math.e**2))
    assert board.Scalars("2_validation_perplexity/all")[0].value == math.inf
    assert board.Scalars("2_validation/c4")[0].value == 2.0


def test_points_past_a_restart_disappear(tmp_path: Path) -> None:
    for first_step, loss in ((1, 1.0), (3, 9.0)):
        board = Board(tmp_path, first_step, {})
        for step in range(first_step, 5):
            board.write(step, {"1_loss/train": loss})
        board.close()
    points = [(e.step, e.value) for e in read(tmp_path).Scalars("1_loss/train")]
    assert points == [(1, 1.0), (2, 1.0), (3, 9.0), (4, 9.0)]


def test_a_run_has_its_layout_and_settings_and_no_sub_run(tmp_path: Path) -> None:
    for kind in ("dense", "moe", "ultramem"):
        config = load_config(f"{kind}-debug")
        board = Board(tmp_path / kind, 1, hyper_parameters(config, 2))
        board.write(1, {"1_loss/train": 1.0})
        board.close()
    assert sorted(path.parent.name for path in tmp_path.rglob("events*")) == [
        "dense",
        "moe",
        "ultramem",
    ]
    board = read(tmp_path / "moe")
    tags = set(board.Tags()["tensors"])
    (event,) = board.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    charts = {chart.title for category in layout.category for chart in category.chart}
    assert {"training loss (nats per token)", "tokens per second", "lookup"} <= charts
    assert board.PluginTagToContent("hparams").keys() >= {"_hparams_/session_start_info"}
    assert "1_loss/train" not in tags  # a scalar, once


def test_settings_have_one_type_for_all_kinds() -> None:
    settings = [
        hyper_parameters(load_config(f"{kind}-debug"), 2)
        for kind in ("dense", "pkm", "moe", "ultramem")
    ]
    for other in settings[1:]:
        assert {k: type(v) for k, v in other.items()} == {
            k: type(v) for k, v in settings[0].items()
        }
    assert settings[0]["params"] == 786_432 == 4 * (4 * 128 * 128 + 2 * 128 * 512)
    assert settings[0]["lr"] == pytest.approx(2e-3)
