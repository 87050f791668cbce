"""The model family's sources as files that stand alone: remote code for transformers.

An exported directory must not import this package. ``ultramem_ds/hf`` is written as part of it,
and may take functions and classes from ``model/`` and below; here such imports are replaced by the
definitions themselves, with everything they need, so that there is one source.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
FAMILY = "ultramem_ds.hf."
MODULES = (
    "configuration_ultramem",
    "conversion_ultramem",
    "memory_ultramem",
    "blocks_ultramem",
    "modeling_ultramem",
)
_HEADER = "# Written by `ultramem-ds export` from the sources of ultramem_ds (Apache-2.0).\n"


def bundle() -> dict[str, str]:
    """File name to source of every file that an exported directory needs."""
    return {f"{name}.py": standalone(_source(FAMILY + name)) for name in MODULES}


def standalone(source: str) -> str:
    """``source`` with this package's imports replaced by what they import."""
    tree = ast.parse(source)
    wanted = _Wanted()
    kept: list[ast.stmt] = []
    family: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(FAMILY):
            names = ", ".join(alias.name for alias in node.names)
            family.append(f"from .{str(node.module).removeprefix(FAMILY)} import {names}")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ultramem_ds."):
            for alias in node.names:
                wanted.take(str(node.module), alias.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                wanted.add_import(node, alias)
        else:
            kept.append(node)
    docstring = f'"""{ast.get_docstring(tree)}\n"""' if ast.get_docstring(tree) else ""
    body = [_text(source, node) for node in kept[1 if docstring else 0 :]]
    imports = [*wanted.import_lines(), *family]
    parts = [_HEADER + docstring, "\n".join(imports), *wanted.definitions, *body]
    return "\n\n\n".join(part for part in parts if part) + "\n"


@dataclass
class _Wanted:
    """Definitions and imports collected so far, dependencies first."""

    modules: set[str] = field(default_factory=set)  # import ...
    imports: dict[str, set[str]] = field(default_factory=dict)  # from ... import ...
    definitions: list[str] = field(default_factory=list)
    taken: dict[str, str] = field(default_factory=dict)  # name -> module

    def take(self, module: str, name: str) -> None:
        """Collect definition ``name`` of ``module`` and what it refers to."""
        if name in self.taken:
            assert self.taken[name] == module, f"two definitions of {name}"
            return
        source = _source(module)
        defined: dict[str, ast.stmt] = {}
        imported: dict[str, tuple[ast.Import | ast.ImportFrom, ast.alias]] = {}
        for node in ast.parse(source).body:
            defined |= dict.fromkeys(_names(node), node)
            if isinstance(node, ast.Import | ast.ImportFrom):
                imported |= {alias.asname or alias.name: (node, alias) for alias in node.names}
        if name in imported:
            node, alias = imported[name]
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("ultramem_ds."):
                self.take(str(node.module), alias.name)
            else:
                self.add_import(node, alias)
            return
        if name not in defined:
            return  # a builtin, or a local variable
        self.taken[name] = module
        for used in ast.walk(defined[name]):
            if isinstance(used, ast.Name) and used.id != name and used.id in {*defined, *imported}:
                self.take(module, used.id)
        self.definitions.append(_text(source, defined[name]))

    def add_import(self, node: ast.Import | ast.ImportFrom, alias: ast.alias) -> None:
        """Collect one name of an import from outside this package."""
        if isinstance(node, ast.Import):
            self.modules.add(ast.unparse(alias))
        else:
            self.imports.setdefault(str(node.module), set()).add(ast.unparse(alias))

    def import_lines(self) -> list[str]:
        """All imports, a line per module."""
        future = "__future__"
        ordered = sorted(self.imports, key=lambda module: (module != future, module))
        named = [f"from {name} import {', '.join(sorted(self.imports[name]))}" for name in ordered]
        return [*named[:1], *(f"import {module}" for module in sorted(self.modules)), *named[1:]]


def _names(node: ast.stmt) -> Iterator[str]:
    """What a statement at the top of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign):
        yield from (target.id for target in node.targets if isinstance(target, ast.Name))
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        yield node.target.id


def _text(source: str, node: ast.stmt) -> str:
    """A statement as written, decorators included."""
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(each.lineno for each in decorators)])
    return "\n".join(source.splitlines()[first - 1 : node.end_lineno])


def _source(module: str) -> str:
    return (PACKAGE.parent / Path(*module.split("."))).with_suffix(".py").read_text()
