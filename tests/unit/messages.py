"""The messages of the package, read from its source, and which of them advise something."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ultramem_ds

PACKAGE = Path(ultramem_ds.__file__).parent
NOT_FOR_USERS = "testing/"  # the test harness

_VERBS = (
    "add|adopt|begin|build|change|check|choose|copy|decompress|delete|do not use|echo|encode|"
    "export|free|give|go back|install|jump|keep|leave|let|look|lower|make|mount|move|name|pass|"
    "pip|point|prepare|put|raise|remove|repeat|resume|rm|run|save|see|set|skip|start|stop|submit|"
    "take|tell|train with|try|ulimit|unpack|unset|update|use|wait|write|apt-get"
)
ADVICE = re.compile(
    rf"(?:^|[;:,(.`?] ?|\b(?:or|and|then|so) )(?P<verb>{_VERBS})\b"
    r"|\S+? (?P<option>--[a-z][a-z-]+)"  # an option that the message does not begin with
    r"|(?P<command>`[^`]+`)"
    r"|(?P<hint>did you mean|nearest|\bneeds?\b|\bwants?\b|\bis for\b|\btakes? )",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Message:
    """A string of the source.

    Attributes:
        module: relative to the package.
        line: where it begins.
        text: with ``{}`` where a value is put in.
    """

    module: str
    line: int
    text: str

    @property
    def advice(self) -> list[tuple[int, int]]:
        """Where it advises something."""
        return [match.span(match.lastgroup or 0) for match in ADVICE.finditer(self.text)]


def messages(source: str, module: str) -> Iterator[Message]:
    """Strings that can be part of a message: no docstrings, no texts of ``--help``."""
    tree = ast.parse(source)
    left_out: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            left_out.add(id(node.value))
        elif isinstance(node, ast.JoinedStr):
            left_out |= {id(inner) for inner in ast.walk(node) if inner is not node}
        elif isinstance(node, ast.keyword) and node.arg in ("help", "description", "epilog"):
            left_out |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        if isinstance(node, ast.JoinedStr):
            pieces = (v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
            text = "".join(map(str, pieces))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = re.sub(r"%(?:\.\d+)?[sdr]", "{}", node.value)
        else:
            continue
        if " " in text.strip():
            yield Message(module, node.lineno, text)


def all_messages() -> list[Message]:
    """Those of the whole package."""
    return [
        message
        for path in sorted(PACKAGE.rglob("*.py"))
        if not str(path.relative_to(PACKAGE)).startswith(NOT_FOR_USERS)
        for message in messages(path.read_text(), str(path.relative_to(PACKAGE)))
    ]
