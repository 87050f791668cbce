"""The Triton kernels: results under Triton's interpreter, and that they compile for a GPU.

The interpreter is chosen when triton's functions are defined, so these tests run in a process of
their own that has TRITON_INTERPRET=1 from the start.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).with_name("kernels_triton_checks.py")
REPOSITORY = Path(__file__).parents[2]


def test_triton_kernels_under_the_interpreter():
    pytest.importorskip("triton")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
    }
    environment.pop("ULTRAMEM_KERNEL", None)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(CHECKS)]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_triton_kernels_compile_to_gpu_code_on_a_machine_without_one():
    """bf16 table, fp32 sums, the widths of DESIGN's layer, for compute capability 9.0."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter replaces the compiler")
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from ultramem_ds.kernels import triton as kernels

    tile = {"ACCUMULATE": tl.float32, "TILE_V": 512}
    cases = [
        (kernels._pool_rectangular, {**tile, "TILE_E": 4}),
        (kernels._pool_ragged, tile),
        (kernels._entry_dots, {"ACCUMULATE": tl.float32, "TILE_C": 256}),
        (kernels._row_backward, tile),
        (kernels._row_backward_atomic, tile),
    ]
    pointers = dict.fromkeys(("values", "pooled", "grad"), "*bf16")
    pointers |= dict.fromkeys(("scores", "dots", "grad_values"), "*fp32")
    ids = ("rows", "projectors", "offsets", "bags", "sorted_rows", "ends", "order")
    pointers |= dict.fromkeys(ids, "*i64")
    for function, constants in cases:
        signature = {
            name: "constexpr" if name in constants else pointers.get(name, "i32")
            for name in function.arg_names
        }
        source = ASTSource(function, signature, constexprs=constants)
        compiled = compile(source, target=GPUTarget("cuda", 90, 32))
        assert len(compiled.asm["cubin"]) > 0, function.__name__
