"""The check that the step asks the device for nothing but what is listed."""

import pytest

from scripts import check_host_syncs


@pytest.mark.parametrize(
    "line, what",
    [
        ("x.sum().item()", "item"),
        ("x.cpu()", "cpu"),
        ("float(x.norm())", "float"),
        ("bool((x > 0).any())", "bool"),
        ("torch.nonzero(x)", "nonzero"),
        ("torch.where(x)", "nonzero"),
        ("x[x > 0]", "mask"),
        ("torch.bincount(x)", "bincount"),
        ("torch.repeat_interleave(x, n)", "repeat_interleave"),
        ("torch.linalg.svdvals(x)", "svdvals"),
    ],
)
def test_questions_are_found(line, what):
    source = f"def step(x, n):\n    y = {line}\n"
    assert list(check_host_syncs.questions(source)) == [("step", 2, what)]


def test_what_stays_on_the_device_is_none():
    source = "torch.where(x > 0, x, 0); x.topk(3); float(n) * x; torch.nonzero_static(x, size=n)"
    assert list(check_host_syncs.questions(source)) == []


def test_a_listed_question_is_listed_once(monkeypatch):
    monkeypatch.setattr(check_host_syncs, "ALLOWED", {"a.py:step": (("item",), "why")})
    assert list(check_host_syncs.check("a.py", "def step(x):\n    x.item()\n")) == []
    twice = "def step(x):\n    x.item()\n    x.item()\n"
    assert ["asks the device" in line for line in check_host_syncs.check("a.py", twice)] == [True]
    assert ["no longer" in line for line in check_host_syncs.check("a.py", "")] == [True]


def test_the_package_passes():
    assert check_host_syncs.main() == 0
