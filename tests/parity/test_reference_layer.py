"""Our layer against the recorded outputs and gradients of the released layer (tests/data)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ultramem_ds.interop import reference_gradients, reference_layer

DATA = Path(__file__).parents[1] / "data"
VECTORS = ["layer_a_layernorm.npz", "layer_a_rmsnorm.npz"]


def load(name):
    with np.load(DATA / name) as arrays:
        recorded = {key: arrays[key] for key in arrays.files}
    meta = json.loads(str(recorded.pop("meta")))
    params = {key[6:]: value for key, value in recorded.items() if key.startswith("param.")}
    return meta, params, recorded


def build(name, dtype=torch.float64):
    meta, params, recorded = load(name)
    layer = reference_layer(params, meta["config"], meta["norm"], meta["eps"]).to(dtype)
    return layer, recorded


def relative_error(actual, expected):
    expected = torch.from_numpy(expected)
    return float((actual.double() - expected).norm() / expected.norm())


# float64: sums of at most a few thousand products, 1e-16 each. float32: the same at 6e-8.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", VECTORS)
def test_output_and_gradients(name, dtype, tolerance):
    layer, recorded = build(name, dtype)
    x = torch.from_numpy(recorded["input"]).to(dtype).requires_grad_()
    output = layer(x)
    (output * torch.from_numpy(recorded["fixed_random"]).to(dtype)).sum().backward()
    assert relative_error(output, recorded["output"]) < tolerance
    assert relative_error(x.grad, recorded["grad_input"]) < tolerance
    gradients = reference_gradients(layer)
    expected = {key[5:]: v for key, v in recorded.items() if key.startswith("grad.")}
    assert gradients.keys() == expected.keys()
    for key, value in expected.items():
        assert gradients[key].shape == value.shape
        assert relative_error(gradients[key], value) < tolerance, key


@pytest.mark.parametrize("name", VECTORS)
def test_selection_is_identical(name):
    layer, recorded = build(name)
    pending = layer.memory.start(torch.from_numpy(recorded["input"]))
    slots = pending.selection.slots_TK.numpy()
    np.testing.assert_array_equal(slots, recorded["best_indice_unshuffled"])
    np.testing.assert_array_equal(pending.rows_TK.numpy(), recorded["physical_indice"])
    scores = pending.selection.scores_TKh.detach()
    assert relative_error(scores, recorded["best_scores"]) < 1e-10
    assert relative_error(pending.lookup.wait().flatten(1).detach(), recorded["pooled"]) < 1e-10


def test_singular_vectors_are_computed_where_they_are_missing():
    meta, params, recorded = load(VECTORS[0])
    vectors = [params.pop("tucker_core_u"), params.pop("tucker_core_v")]
    layer = reference_layer(params, meta["config"], meta["norm"], meta["eps"])
    layer(torch.from_numpy(recorded["input"]))
    ours = layer.memory.retrieval.form.directions.numpy()
    recorded_2Hr = np.stack([v[0, :, 0] for v in vectors])
    sign = np.sign((ours * recorded_2Hr).sum((0, 2)))[None, :, None]
    np.testing.assert_allclose(ours * sign, recorded_2Hr, atol=1e-12)


def test_bad_arrays_are_named():
    meta, params, _ = load(VECTORS[0])
    config, norm, eps = meta["config"], meta["norm"], meta["eps"]
    with pytest.raises(ValueError, match="batch"):
        reference_layer(params, config, "batch", eps)
    with pytest.raises(ValueError, match=r"retrieval\.keys"):
        reference_layer(params, {**config, "knum": 13}, norm, eps)
    with pytest.raises(ValueError, match=r"bias.*no such array"):
        reference_layer({**params, "query_norm.bias": np.zeros(16)}, config, norm, eps)
    del params["keys"]
    with pytest.raises(ValueError, match=r"retrieval\.keys\.weight missing"):
        reference_layer(params, config, norm, eps)
