"""What ``bench decode`` and ``bench step`` count and force, without timing anything."""

import pytest
import torch

from ultramem_ds.bench import decode
from ultramem_ds.bench.decode import DecodeBenchConfig, ratios, run_decode_bench
from ultramem_ds.bench.decode_cost import Part, Rates, Touched, paper_bytes, step_parts
from ultramem_ds.bench.decode_models import (
    WeightBuffer,
    balanced_experts,
    build_on,
    elements_needed,
)
from ultramem_ds.bench.step import equal_flops_dense
from ultramem_ds.config.presets import preset
from ultramem_ds.model.accounting import count


@pytest.mark.parametrize("tokens, distinct", [(1, 2), (5, 10), (16, 32), (40, 32)])
def test_balanced_experts_touch_as_many_as_possible(tokens, distinct):
    draws = balanced_experts(3, tokens, 2, 32, torch.Generator().manual_seed(0))
    assert draws.shape == (3, tokens, 2)
    for draw_Tk in draws:
        counts = torch.bincount(draw_Tk.flatten(), minlength=32)
        assert int((counts > 0).sum()) == distinct
        assert int(counts.max()) - int(counts.min()) <= 1
        assert (draw_Tk[:, 0] != draw_Tk[:, 1]).all()


def test_parts_add_up_to_the_predicted_parameters():
    # Batch 1: every activated matrix once; of PKM and UltraMem only the keys are read otherwise.
    for name in ("dense-151m", "moe-151m-2in32"):
        config = preset(name)
        parts = step_parts(config, 1, 4, 0, Touched(experts=2, rows=0))
        activated = count(config).activated_params
        assert sum(part.num_bytes for part in parts) == 4 * activated
        assert sum(part.num_flops for part in parts) == 2 * activated
    config = preset("ultramem-151m-x12")
    by_name = {p.name: p for p in step_parts(config, 16, 4, 0, Touched(experts=0, rows=500.0))}
    assert by_name["table rows"].num_bytes == 3 * 500 * 512 * 4
    assert by_name["key search"].num_bytes == 3 * 2 * 2 * 2200 * 256 * 4  # folded: no rank
    assert by_name["value projection"].num_bytes == 3 * 4 * 512 * 1024 * 4


def test_paper_formula_by_hand():
    assert paper_bytes(preset("moe-151m-2in32"), 1, 4) == 12 * 2 * 2 * 1024**2 * 4
    assert paper_bytes(preset("moe-151m-2in32"), 64, 4) == 12 * 32 * 2 * 1024**2 * 4
    assert paper_bytes(preset("ultramem-151m-x12"), 16, 4) == 3 * 16 * 32 * 512 * 4
    assert paper_bytes(preset("dense-151m"), 16, 4) == 0


def test_roofline_is_the_slower_resource_part_by_part():
    parts = [Part("streamed", 100.0, 1.0), Part("multiplied", 1.0, 60.0)]
    assert Rates(bytes_per_s=10.0, flops_per_s=20.0).least_ms(parts) == pytest.approx(13_000)


def test_ratios_are_void_without_a_fair_mixture():
    def row(kind, time_ms, fair):
        return {"kind": kind, "batch": 1, "kv_mode": "none", "time_ms": time_ms, "fair": fair}

    times = {"dense": 2.0, "pkm": 3.0, "moe": 8.0, "ultramem": 2.5}
    found = {r["ratio"]: r for r in ratios([row(k, t, False) for k, t in times.items()])}
    assert found["moe/ultramem"]["value"] == 3.2 and found["moe/ultramem"]["void"]
    assert found["ultramem/dense"]["value"] == 1.25 and not found["ultramem/dense"]["void"]


def test_dense_model_is_widened_to_equal_flops():
    dense, other = preset("dense-151m"), preset("ultramem-151m-x12")
    widened = equal_flops_dense(dense, other)
    got, wanted = count(widened).flops_per_token, count(other).flops_per_token
    assert widened.model.inner_size > dense.model.inner_size
    assert got == pytest.approx(wanted, rel=1e-3)


@pytest.fixture
def unwritten_is_nan():
    """Memory from ``torch.empty`` reads as NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", ["dense-debug", "moe-debug", "pkm-debug", "ultramem-debug"])
@pytest.mark.usefixtures("unwritten_is_nan")
def test_every_weight_of_a_measured_model_has_a_value(name):
    config = preset(name)
    buffer = WeightBuffer(elements_needed(config), torch.float32, "cpu", seed=0)
    model = build_on(buffer, config)
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert {name for name, tensor in weights.items() if tensor.is_meta} == set()
    assert {name for name, tensor in weights.items() if tensor.isnan().any()} == set()


def test_experts_that_divide_by_no_choice_are_dealt_too():
    """33 experts, 2 per token: every other deal straddles a token."""
    (draw_Tk,) = balanced_experts(1, 3300, 2, 33, torch.Generator().manual_seed(0))
    assert (draw_Tk[:, 0] != draw_Tk[:, 1]).all()
    assert torch.equal(draw_Tk.flatten().bincount(), torch.full((33,), 200))


def test_decode_document_has_the_contracted_rows(monkeypatch, capsys):
    """Batches without room are there by formula; where both are, they agree."""
    monkeypatch.setattr(decode, "free_bytes", lambda device: 1 << 30)
    document = run_decode_bench(
        DecodeBenchConfig(
            size="debug",
            batches=(1, 3, 131_072),
            kv_modes=("none", "full"),
            rounds=3,
            sample_s=1e-4,
        )
    )
    formulas = {(r["preset"], r["batch"], r["kv_mode"]): r for r in document["formula_rows"]}
    assert len(formulas) == 4 * 3 * 2
    for row in document["rows"]:
        formula = formulas[row["preset"], row["batch"], row["kv_mode"]]
        # Rows are drawn, not counted: some 16 of 36,864, all distinct but for a few in a thousand.
        assert formula["bytes_read"] == pytest.approx(row["bytes_read"], rel=2e-3)
        assert formula["flops"] == row["flops"]
        assert formula["roofline_ms"] > 0
    largest = {r["kind"]: r for r in formulas.values() if r["batch"] == 131_072}
    assert largest["moe"]["distinct_experts"] == 16
    assert largest["ultramem"]["distinct_rows"] == pytest.approx(192 * 192)
    assert largest["moe"]["bytes_sparse_paper"] == 4 * 16 * 2 * 128 * 128 * 4
    assert largest["ultramem"]["bytes_sparse_paper"] == 2 * 192 * 192 * 64 * 4
    assert "batch 131072, kv full: by formula only" in capsys.readouterr().err
    keys = [(row["preset"], row["batch"], row["kv_mode"]) for row in document["rows"]]
    assert len(keys) == len(set(keys)) == 4 * 2 * 2
    for row in document["rows"]:
        assert row["routing"] == "forced-uniform"
        assert row["time_ms"] > 0 and row["bytes_read"] > 0 and row["roofline_share"] > 0
        assert isinstance(row["fair"], bool)
        if row["kind"] == "moe":
            assert row["distinct_experts"] == min(2 * row["batch"], 16)
    assert {row["routing"] for row in document["other_rows"]} == {"own", "iid-uniform"}
    assert {"hardware", "versions", "config", "commit"} <= document.keys()


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"size": "7b"}, "--size 7b"),
        ({"batches": (0,)}, "--batch"),
        ({"kv_modes": ("half",)}, "--kv half"),
        ({"rounds": 2}, "--rounds 2"),
    ],
)
def test_bad_settings_are_named(bad, message):
    with pytest.raises(ValueError, match=message):
        DecodeBenchConfig(**bad)
