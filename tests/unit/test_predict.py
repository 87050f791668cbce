"""``bench predict``: what is counted without a device, against counts made another way."""

import json
from pathlib import Path

import pytest

from ultramem_ds.bench.decode import FAMILIES
from ultramem_ds.bench.decode_cost import Rates, Touched, step_parts
from ultramem_ds.bench.kernel_cost import LookupShape, backward_parts, lookup_programs
from ultramem_ds.bench.launches import Launch, build_dry, count_launches
from ultramem_ds.bench.predict import (
    GPUS,
    LAUNCH_US,
    PredictConfig,
    Step,
    compare,
    fit_launch_us,
    kv_bytes,
    launch_bound_ms,
    published,
    run_predict,
)
from ultramem_ds.cli.main import main
from ultramem_ds.config.presets import preset

DATA = Path(__file__).parents[2] / "docs" / "gpu" / "data"


@pytest.mark.parametrize("name", FAMILIES["debug"])
@pytest.mark.parametrize("mode", ["none", "full"])
def test_launched_products_are_those_of_the_formulas(name, mode):
    # Two independent counts: shapes of operators that ran, and the layer's formulas.
    config, batch = preset(name), 3
    experts = 6.0 if config.model.kind == "moe" else 0.0
    launches = count_launches(build_dry(config), batch, mode, experts)
    parts = step_parts(config, batch, 2, kv_bytes(config, batch, mode), Touched(experts, 0.0))
    flops = {part.name: part.num_flops for part in parts}
    attention = sum(launch.num_flops for launch in launches if launch.name == "attention")
    products = sum(launch.num_flops for launch in launches) - attention
    # Row dots and the lookup's sums are not matrix products where torch runs them; scores of pairs
    # are, and the formulas leave them out.
    wanted = sum(flops.values()) - flops["kv cache"]
    wanted -= flops.get("candidates", 0.0) + flops.get("table rows", 0.0)
    assert products == pytest.approx(wanted, rel=0.02)
    if mode == "full":
        assert attention == flops["kv cache"]
        read = sum(launch.num_bytes for launch in launches if launch.name == "attention")
        assert read == pytest.approx(kv_bytes(config, batch, mode), rel=0.01)


def test_idle_experts_are_not_read():
    model = build_dry(preset("moe-debug"))
    few, all_of_them = (
        sum(launch.num_bytes for launch in count_launches(model, 1, "none", experts))
        for experts in (2.0, 16.0)
    )
    shape = preset("moe-debug").model
    expert = 2 * shape.hidden_size * shape.inner_size * 2
    assert all_of_them - few == pytest.approx(14 * expert * shape.num_layers)


def test_bytes_of_a_lookup_by_hand():
    shape = LookupShape(tokens=1, entries=2, num_rows=10**9, value_dim=4, num_cores=1, expansion=3)
    by_name = {part.name: part for part in lookup_programs(shape)}
    # Two rows of 4 bf16 values, two ids and projectors, two scores, three pooled vectors.
    assert by_name["pool_rectangular_program"].num_bytes == pytest.approx(16 + 32 + 8 + 24)
    assert by_name["pool_rectangular_program"].num_flops == 2 * 2 * 4
    # Two rows: gradient in, values and both moments in and out, an id.
    assert by_name["row_adam_program"].num_bytes == pytest.approx(2 * (4 * (4 + 4 + 16) + 8))
    assert len(backward_parts(shape)) == 4


def test_a_launch_takes_at_least_its_time():
    rates = Rates(bytes_per_s=1e9, flops_per_s=1e9)
    launches = [Launch("small", 1.0), Launch("read", 5e3), Launch("multiply", 1.0, 7e3)]
    assert launch_bound_ms(launches, rates, 2.0) == pytest.approx((2 + 5 + 7) * 1e-3)
    fitted = fit_launch_us(launches, rates, launch_bound_ms(launches, rates, 3.5))
    assert fitted == pytest.approx(3.5)


def test_published_rates_order_the_gpus():
    config = preset("ultramem-debug")
    step = Step.of(config, build_dry(config), 1, "none")
    times = [step.times(0.0)[gpu] for gpu in GPUS]
    rooflines = [row["roofline_ms"] for row in times]
    assert rooflines == sorted(rooflines, reverse=True)
    assert all(row["launch_bound_ms"] >= row["roofline_ms"] for row in times)
    assert published("A100") == Rates(2.039e12, 3.12e14)


def test_the_document_has_a_row_per_step():
    document = run_predict(PredictConfig(size="debug", batches=(1, 8)))
    keys = {(row["preset"], row["batch"]) for row in document["rows"]}
    assert len(keys) == len(document["rows"]) == 8
    assert all(set(row["gpus"]) == set(GPUS) for row in document["rows"])
    assert len(document["lookups"]) == 16 and document["versions"]["torch"]


def test_the_launch_time_is_that_of_the_measured_step():
    stored = json.loads((DATA / "predict-151m.json").read_text())
    assert stored["launch_us"] == pytest.approx(LAUNCH_US, rel=0.01)
    (base,) = [row for row in stored["rows"] if row["fitted"]]
    assert (base["kind"], base["batch"]) == ("dense", 1)
    assert base["measured_over_predicted"] == pytest.approx(1.0)


def test_what_was_not_measured_on_a_gpu_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="not measured in bf16 on a GPU"):
        compare(DATA.parents[1] / "benchmarks" / "data" / "decode-151m.json")
    (tmp_path / "empty.json").write_text("{}")
    assert main(["bench", "predict", "--measured", str(tmp_path / "empty.json")]) == 2
    assert main(["bench", "predict", "--size", "debug", "--batch", "0"]) == 2
    assert "--batch" in capsys.readouterr().err
