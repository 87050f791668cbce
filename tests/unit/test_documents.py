"""What documents, messages and package metadata name is there."""

from __future__ import annotations

import ast
import re
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.dist.launching import ROOT
from ultramem_ds.doctor.software import requirements

DOCUMENTS = [
    *ROOT.glob("*.md"),
    *(path for path in (ROOT / "docs").rglob("*.md")),
    *(path for path in (ROOT / "benchmarks").rglob("*.md")),
]
SOURCES = [*(ROOT / "ultramem_ds").rglob("*.py"), *(ROOT / "launch").glob("*.sh")]


def test_links_lead_somewhere() -> None:
    dead = []
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text()):
            if "://" not in target and not (document.parent / target).exists():
                dead.append(f"{document.relative_to(ROOT)}: {target}")
    assert not dead


def test_config_files_that_are_named_exist() -> None:
    """A message that says "use ds_configs/x.json" can be followed, from any directory."""
    missing = []
    for path in [*SOURCES, *DOCUMENTS, ROOT / "Makefile"]:
        for name in re.findall(r"ds_configs/[\w-]+\.json", path.read_text()):
            if not (ROOT / name).is_file() or not (ROOT / "ultramem_ds" / name).is_file():
                missing.append(f"{path.relative_to(ROOT)}: {name}")
    assert not missing


def imported() -> set[str]:
    """Distributions' top-level modules that the package imports, but for its own extras."""
    found: set[str] = set()
    for path in (ROOT / "ultramem_ds").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"ultramem_ds"}


def test_every_import_is_declared() -> None:
    """In ``install_requires``, or in an extra and then imported where it is needed only."""
    distributions = metadata.packages_distributions()
    text = (ROOT / "setup.cfg").read_text()
    extras = set(re.findall(r"^    ([\w-]+)", text.partition("[options.extras_require]")[2], re.M))
    needed = {requirement.name for requirement in requirements(ROOT)} | extras
    undeclared = [
        module
        for module in sorted(imported())
        if module in distributions
        and not {canonicalize_name(name) for name in distributions[module]}
        & {canonicalize_name(name) for name in needed}
    ]
    assert not undeclared


@pytest.mark.parametrize("requirement", requirements(ROOT), ids=str)
def test_floors_hold_in_the_tested_environment(requirement: Requirement) -> None:
    """And those of what this program reaches into are the tested versions themselves."""
    pins = (ROOT / "constraints.txt").read_text()
    name = requirement.name.replace("-", "[-_]").replace("_", "[-_]")
    pinned = re.search(rf"^{name}==(\S+)", pins, re.MULTILINE | re.IGNORECASE)
    if requirement.name == "torch":  # its build is left to the package index
        return
    assert pinned, f"{requirement.name} is not in constraints.txt"
    assert requirement.specifier.contains(pinned[1])
