"""Fails if a package of ultramem_ds imports one that stands after it, or files import in a circle.

``LAYERS`` is the declaration: data flows down the list, so a package may import what stands above
it and its own files. Imports inside functions count as well: they are only later, not other arrows.
Only ``zero`` may import DeepSpeed.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ultramem_ds"

LAYERS = (
    ("utils",),
    ("config",),
    ("kernels",),
    ("model",),
    ("optim", "data", "interop"),
    ("sharding",),
    ("planning",),
    ("checkpoint",),
    ("zero",),
    ("telemetry",),
    ("exchange",),
    ("watch",),
    ("train",),
    ("infer",),
    ("harness",),
    ("hf", "vllm"),
    ("testing",),
    ("bench",),
    ("doctor", "launcher", "study"),
    ("demo",),
    ("corpus",),
    ("cli",),
    ("__main__",),
)
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}
DEEPSPEED = "zero"


def module_name(path: Path) -> str:
    """``ultramem_ds/data/loader.py`` is ``ultramem_ds.data.loader``, a package its directory."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that Python ``source`` imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def package_of(module: str) -> str:
    """The room a module is in: ``data`` for ``ultramem_ds.data.loader``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def wrong_arrows(module: str, source: str) -> Iterator[str]:
    """What ``module`` imports and may not, with the line."""
    here = package_of(module)
    for line, name in imports(source):
        if name.split(".")[0] == "deepspeed" and here != DEEPSPEED:
            yield f"{line}: {name}: DeepSpeed outside ultramem_ds/{DEEPSPEED}"
        if not name.startswith("ultramem_ds.") or not here:
            continue
        there = package_of(name)
        if there == "__version__" or there == here:
            continue
        if there not in LEVEL or here not in LEVEL:
            yield f"{line}: {name}: {there if there not in LEVEL else here} is not in LAYERS"
        elif LEVEL[there] >= LEVEL[here]:
            yield f"{line}: {name}: {there} stands after {here} or beside it"


def find_circle(edges: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, the first one twice; empty if there is none."""
    done: set[str] = set()
    path: list[str] = []

    def visit(module: str) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        path.append(module)
        for other in sorted(edges.get(module, ())):
            if circle := visit(other):
                return circle
        path.pop()
        done.add(module)
        return []

    for module in sorted(edges):
        if circle := visit(module):
            return circle
    return []


def main() -> int:
    """Check the package; 1 if something was found."""
    sources = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
    found: list[str] = []
    edges: dict[str, set[str]] = {}
    for module, path in sources.items():
        text = path.read_text()
        found += [f"{path.relative_to(ROOT)}:{wrong}" for wrong in wrong_arrows(module, text)]
        named = (name if name in sources else name.rpartition(".")[0] for _, name in imports(text))
        edges[module] = {name for name in named if name in sources and name != module}
    if circle := find_circle(edges):
        found.append("import circle: " + " -> ".join(circle))
    print("\n".join(found) or "imports only go down the list of scripts/check_arrows.py")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
