"""Real text that every machine has: the Python standard library, in RedPajama's schema.

Two subsets: ``sources`` (module sources) and ``docs`` (documentation topics and docstrings).
"""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from ultramem_ds.utils.files import write_text

MIN_BYTES = 10_000_000
_ENOUGH_BYTES = 13_000_000  # of sources; more only makes the demo slower
_MIN_DOC_CHARS = 200


def write_corpus(directory: Path) -> dict[str, int]:
    """Write ``sources.jsonl`` and ``docs.jsonl``; returns bytes of text per subset.

    Raises:
        ValueError: if this Python installation has less than 10 MB of text.
    """
    directory.mkdir(parents=True, exist_ok=True)
    sizes = {
        "sources": _write(directory / "sources" / "sources.jsonl", _sources()),
        "docs": _write(directory / "docs" / "docs.jsonl", _docs()),
    }
    total = sum(sizes.values())
    if total < MIN_BYTES:
        raise ValueError(
            f"the standard library of this Python has only {total} bytes of text, {MIN_BYTES} are "
            "needed: is it a stripped installation without sources?"
        )
    return sizes


def _write(path: Path, documents: Iterator[tuple[str, str]]) -> int:
    lines, size = [], 0
    for origin, text in documents:
        lines.append(json.dumps({"text": text, "meta": {"source": origin}}) + "\n")
        size += len(text.encode())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(lines))
    return size


def _modules() -> Iterator[tuple[str, str]]:
    """Relative path and source of readable modules of the standard library, its tests last."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    for name in sorted(names, key=lambda name: ("test" in name.parts, str(name))):
        if "site-packages" in name.parts or "pydoc_data" in name.parts:
            continue
        path = root / name
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        yield str(name), text


def _sources() -> Iterator[tuple[str, str]]:
    size = 0
    for name, text in _modules():
        if len(text) >= _MIN_DOC_CHARS:
            yield name, text
            size += len(text)
        if size >= _ENOUGH_BYTES:
            return


def _docs() -> Iterator[tuple[str, str]]:
    for name, text in sorted(topics.items()):
        yield f"topics/{name}", text
    for name, text in _modules():
        if name.startswith("test"):
            return
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        strings = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        joined = "\n\n".join(string for string in strings if string)
        if len(joined) >= _MIN_DOC_CHARS:
            yield f"docstrings/{name}", joined
