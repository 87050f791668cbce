"""``doctor --gpu --rehearse``: every step runs; one that fails says so and the rest goes on."""

import json

import pytest
import torch

from ultramem_ds.doctor import gpu


@pytest.mark.slow
def test_the_rehearsal_runs_every_step(tmp_path, monkeypatch):
    outcomes = list(gpu.run_steps(rehearse=True))
    assert [outcome.step for outcome in outcomes] == list(gpu.STEPS)
    wrong = [outcome.line() for outcome in outcomes if outcome.status == "FAIL"]
    assert wrong == []
    assert [outcome.step for outcome in outcomes if outcome.status == "skip"] == ["two devices"]
    gpu.write_report(outcomes, tmp_path)
    document = json.loads((tmp_path / "gpu-check.json").read_text())
    assert len(document["steps"]) == len(gpu.STEPS) and document["hardware"]
    assert (tmp_path / "gpu-check.md").read_text().count("| ok |") == len(gpu.STEPS) - 1


def test_a_failing_step_does_not_stop_the_others():
    def broken(setting):
        raise RuntimeError("no kernel image\nis available")

    steps = {"broken": broken, "after": lambda setting: "fine"}
    first, second = gpu.run_steps(rehearse=True, steps=steps)
    assert (first.status, first.detail) == ("FAIL", "RuntimeError: no kernel image")
    assert (second.status, second.detail) == ("ok", "fine")


def test_a_wrong_kernel_is_seen(monkeypatch):
    def wrong(device, dtype, kernel):
        return [torch.full((2,), 1.0 if kernel == "reference" else 1.1)]

    monkeypatch.setattr(gpu, "_lookup_and_update", wrong)
    (outcome,) = gpu.run_steps(rehearse=True, steps={"kernels": gpu.kernels})
    assert outcome.status == "FAIL" and "off by 0.1" in outcome.detail


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do():
    with pytest.raises(ValueError, match="--rehearse"):
        list(gpu.run_steps(rehearse=False))
