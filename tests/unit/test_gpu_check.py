"""``doctor --gpu --rehearse``: every step runs; one that fails says so and the rest goes on."""

import json

import pytest
import torch

from ultramem_ds.doctor import checkout, gpu


@pytest.mark.slow
def test_the_rehearsal_runs_every_step(tmp_path, monkeypatch):
    outcomes = list(gpu.run_steps(rehearse=True))
    assert [outcome.step for outcome in outcomes] == list(gpu.STEPS)
    wrong = [outcome.line() for outcome in outcomes if outcome.status == "FAIL"]
    assert wrong == []
    assert [outcome.step for outcome in outcomes if outcome.status == "skip"] == []
    gpu.write_report(outcomes, tmp_path)
    document = json.loads((tmp_path / "gpu-check.json").read_text())
    assert len(document["steps"]) == len(gpu.STEPS) and document["hardware"]
    assert (tmp_path / "gpu-check.md").read_text().count("| ok |") == len(gpu.STEPS)


def test_a_failing_step_does_not_stop_the_others():
    def broken(setting):
        raise RuntimeError("no kernel image\nis available")

    steps = {"broken": broken, "after": lambda setting: "fine"}
    first, second = gpu.run_steps(rehearse=True, steps=steps)
    assert (first.status, first.detail) == ("FAIL", "RuntimeError: no kernel image")
    assert (second.status, second.detail) == ("ok", "fine")


def test_steps_are_chosen_by_name():
    assert list(gpu.chosen_steps(["lookups", "kernels"])) == ["kernels", "lookups"]
    with pytest.raises(ValueError, match="--steps kernel: use some of environment, kernels"):
        gpu.chosen_steps(["kernel"])


def test_without_a_checkout_the_tests_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(checkout.ultramem_ds, "__file__", str(tmp_path / "ultramem_ds" / "x.py"))
    (outcome,) = gpu.run_steps(rehearse=True, steps={"tests": gpu.tests})
    assert outcome.status == "skip" and "without its tests" in outcome.detail


def test_a_failing_marked_test_fails_the_step(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    monkeypatch.setattr(checkout.ultramem_ds, "__file__", str(tmp_path / "ultramem_ds" / "x.py"))
    (tmp_path / "tests" / "test_one.py").write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_it():\n    assert False\n"
    )
    (outcome,) = gpu.run_steps(rehearse=True, steps={"tests": gpu.tests})
    assert outcome.status == "ok" and outcome.detail.startswith("1 test collected")
    with pytest.raises(AssertionError, match=r"FAILED tests/test_one.py::test_it"):
        checkout.run_marked(checkout.marked_files(), collect_only=False)


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
