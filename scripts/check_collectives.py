"""Fails if a file other than ultramem_ds/sharding/comm.py calls a collective (``make lint``).

Bytes are counted, and traps of the backends avoided, in one file; this keeps it the only one. A
collective is any communicating function of ``torch.distributed`` or ``deepspeed.comm``, however it
was imported; asking for ranks and starting or ending the process group is not.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ultramem_ds"
ALLOWED = PACKAGE / "sharding" / "comm.py"

MODULES = ("torch.distributed", "deepspeed.comm")
COLLECTIVE = re.compile(
    r"(inference_)?(all_reduce|all_gather|all_to_all|reduce_scatter|reduce|broadcast|gather|scatter"
    r"|barrier|monitored_barrier|send|recv|isend|irecv|batch_isend_irecv|_coalescing_manager"
    r"|new_group|new_subgroups)(_[a-z_]+)?$"
)


def collectives(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every collective that Python ``source`` names."""
    tree = ast.parse(source)
    names = {"torch": "torch", "deepspeed": "deepspeed"}  # local name -> dotted module or function
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname:
                    names[alias.asname] = alias.name
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                dotted = f"{node.module}.{alias.name}"
                names[alias.asname or alias.name] = dotted
                if _is_collective(dotted):
                    yield node.lineno, dotted
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            dotted = _dotted(node, names)
            if _is_collective(dotted):
                yield node.lineno, dotted


def _dotted(node: ast.expr, names: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def _is_collective(dotted: str) -> bool:
    module, _, function = dotted.rpartition(".")
    in_module = any(module == name or module.startswith(name + ".") for name in MODULES)
    # deepspeed_import re-exports the module deepspeed under its own name.
    in_module = in_module or module.endswith(tuple("." + name for name in MODULES))
    return in_module and COLLECTIVE.match(function) is not None


def main() -> int:
    """Check the package; 1 if something was found."""
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name} outside {ALLOWED.relative_to(ROOT)}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != ALLOWED
        for line, name in collectives(path.read_text())
    ]
    print("\n".join(found) or "collectives only in ultramem_ds/sharding/comm.py")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
