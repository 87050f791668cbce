"""The lint check of imports: what it lets pass, what it finds, and the picture in the docs."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_SPEC = importlib.util.spec_from_file_location("check_arrows", ROOT / "scripts/check_arrows.py")
check = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(check)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ultramem_ds.model.lm", "from ultramem_ds.train.engine import TrainEngine"),
        ("ultramem_ds.model.lm", "def f():\n    from ultramem_ds.sharding.comm import Comm"),
        ("ultramem_ds.data.loader", "import ultramem_ds.optim.schedule"),  # beside it
        ("ultramem_ds.watch.desync", "import deepspeed"),
        ("ultramem_ds.sharding.comm", "from deepspeed.comm import all_reduce"),
        ("ultramem_ds.cli.main", "from ultramem_ds.elsewhere import thing"),
    ],
)
def test_wrong_arrows_are_found(module, source):
    assert len(list(check.wrong_arrows(module, source))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ultramem_ds.train.engine", "from ultramem_ds.zero.gate import StepGate"),
        ("ultramem_ds.zero.gate", "import deepspeed.comm"),
        ("ultramem_ds.data.loader", "from ultramem_ds.data.skips import SkipRanges"),
        ("ultramem_ds.cli.main", "from ultramem_ds import __version__"),
    ],
)
def test_right_arrows_pass(module, source):
    assert not list(check.wrong_arrows(module, source))


def test_circles_are_found():
    assert check.find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert check.find_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_every_package_is_declared_and_drawn():
    packages = {path.parent.name for path in (ROOT / "ultramem_ds").glob("*/__init__.py")}
    assert packages <= set(check.LEVEL)
    page = (ROOT / "docs/how-it-works.md").read_text()
    drawing = page[page.index("## 1.") : page.index("## 2.")]
    undrawn = [name for name in packages if not re.search(rf"\b{name}\b", drawing)]
    assert not undrawn, f"docs/how-it-works.md does not draw {undrawn}"
