"""Fails if code of the step asks the device for a number or a size, except where ``ALLOWED`` says.

On a GPU such a question stops the host until everything launched before has run (``make lint``).
What cannot be told from the source (whether ``int(x)`` is of a tensor) is found by the tests that
run the model on the meta device and count (``tests/parity/test_meta_device.py``,
``tests/dist/test_host_syncs.py``).
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ultramem_ds"

# What runs in a training or decode step.
STEP = ("model", "kernels", "sharding", "optim", "infer", "zero", "train/engine.py")
METHODS = {
    "item",
    "tolist",
    "cpu",
    "numpy",
    "nonzero",
    "argwhere",
    "unique",
    "unique_consecutive",
    "bincount",
    "masked_select",
    "is_nonzero",
}
FACTORIZATIONS = {"svd", "svdvals", "eigh", "eigvalsh", "inv", "solve"}  # look at an error code
REDUCTIONS = {"sum", "any", "all", "max", "min", "mean", "norm", "log", "amax", "isfinite"}

# file:function -> what it asks, and why it may.
_ONCE = "once per optimizer step, by design: "
ALLOWED: dict[str, tuple[tuple[str, ...], str]] = {
    "model/init.py:gaussian_top_mean": (("float",), "initialisation"),
    "model/init.py:score_moments": (("float", "float"), "initialisation"),
    "model/moe.py:forward": (("bincount", "tolist"), "one process's loop; decoding is grouped"),
    "model/memory/scores.py:_decompose": (("cpu",), _ONCE + "every rank gets the same bits"),
    "model/memory/scores.py:singular_vectors": (("svd",), "on the CPU"),
    "model/memory/stats.py:touched_share": (("int", "float"), "once per statistics window"),
    "model/memory/stats.py:usage_kl": (("float", "float", "mask"), "once per statistics window"),
    "model/memory/stats.py:summary": (("cpu", "tolist", "tolist"), "once per statistics window"),
    "kernels/embedding_bag.py:group_by_row": (("unique_consecutive",), "not the GPU's kernel"),
    "kernels/embedding_bag.py:group_by_projector": (("bincount",), "not the GPU's kernel"),
    "kernels/row_adam.py:_ascending_below": (("bool",), "CPU only"),
    "sharding/scheme.py:agree_on_splits": (("tolist",), "the one question of a sharded lookup"),
    "sharding/comm.py:all_agree": (("item",), "checkpoints and start, not steps"),
    "sharding/comm.py:numbers_from_first": (("tolist",), "checkpoints and start, not steps"),
    "sharding/experts.py:forward": (
        ("bincount", "tolist", "tolist"),
        "evaluation's experts over ranks: how many tokens go where",
    ),
    "sharding/experts.py:_answer": (("repeat_interleave", "nonzero"), "as above"),
    "sharding/row_sum.py:add": (("mask",), "row-sparse: the size of the rows touched"),
    "sharding/row_sum.py:take": (("nonzero",), _ONCE + "the size of the rows touched"),
    "optim/row_adam.py:_caught_up": (("cpu", "cpu", "cpu"), "row-sparse: once per lookup"),
    "infer/branch.py:_visible_BC": (("int",), "generation: once per forward of a whole prompt"),
    "infer/generate.py:stream": (("tolist",), "once per token: it is handed out"),
    "zero/row_sparse.py:open": (("unique",), "row-sparse: the size of the rows touched"),
    "zero/row_sparse.py:take_gradient": (("tolist",), _ONCE + "copies exchange unequal parts"),
    "zero/row_sparse.py:_reduce_whole": (("nonzero",), _ONCE + "the size of the rows touched"),
    "zero/gradient_norms.py:read": (("tolist",), _ONCE + "what is logged"),
    "train/engine.py:train_step": (("cpu", "tolist", "tolist"), _ONCE + "what is logged"),
}


def _asks(node: ast.AST) -> str | None:
    """What a node asks the device, if it can be told."""
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Compare):
        return "mask"
    if not isinstance(node, ast.Call):
        return None
    function = node.func
    if isinstance(function, ast.Attribute):
        if function.attr in METHODS:
            return function.attr
        if function.attr in FACTORIZATIONS and ast.unparse(function).startswith("torch.linalg"):
            return function.attr
        keywords = {keyword.arg for keyword in node.keywords}
        if function.attr == "repeat_interleave" and "output_size" not in keywords:
            return function.attr
        if function.attr == "where" and len(node.args) == 1:
            return "nonzero"
    elif isinstance(function, ast.Name) and function.id in ("int", "float", "bool"):
        for inner in ast.walk(node):
            if isinstance(inner, ast.Attribute) and inner.attr in REDUCTIONS:
                return function.id
    return None


def questions(source: str) -> Iterator[tuple[str, int, str]]:
    """(function, line, what) of every question that Python ``source`` asks."""

    def visit(node: ast.AST, function: str) -> Iterator[tuple[str, int, str]]:
        for child in ast.iter_child_nodes(node):
            inside = isinstance(child, ast.FunctionDef)
            what = _asks(child)
            if what is not None:
                yield function, child.lineno, what  # type: ignore[attr-defined]
            yield from visit(child, child.name if inside else function)

    yield from visit(ast.parse(source), "")


def check(name: str, source: str) -> Iterator[str]:
    """What file ``name`` asks and may not."""
    left = {
        place: Counter(whats) for place, (whats, _) in ALLOWED.items() if place.startswith(name)
    }
    for function, line, what in questions(source):
        place = f"{name}:{function}"
        if left.get(place, Counter())[what] > 0:
            left[place][what] -= 1
        else:
            yield f"{name}:{line}: {function} asks the device ({what}); see ALLOWED"
    for place, counts in left.items():
        for what in counts.elements():
            yield f"{place} no longer asks ({what}): take it from ALLOWED"


def main() -> int:
    """Check the step's files; 1 if something was found."""
    found: list[str] = []
    for part in STEP:
        path = PACKAGE / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            found += check(file.relative_to(PACKAGE).as_posix(), file.read_text())
    print("\n".join(found) or f"the step asks the device in {len(ALLOWED)} known places only")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
