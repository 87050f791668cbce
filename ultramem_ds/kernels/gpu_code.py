"""Compile the Triton kernels for GPUs that are not here; say what their code needs.

``python -m ultramem_ds.kernels.gpu_code`` prints the table of docs/kernels.md: registers a thread,
bytes spilled to memory, shared memory a program, for the widths of the paper's layers. Code that
spills is slow whatever the GPU, and is seen here without one.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Compute capabilities of A100, H100 and H200, B200; and an MI300.
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32)}
AMD_TARGETS = {"gfx942": ("hip", "gfx942", 64)}

# Arguments by name: the rest are numbers.
_IDS = ("rows", "projectors", "offsets", "bags", "sorted_rows", "order")
_FP32 = ("scores", "dots", "grad_values", "partials", "exp_avg", "exp_avg_sq")
_SCALARS = ("grad_scale", "step_size", "root_correction", "decay", "beta1", "beta2", "eps")


@dataclass(frozen=True)
class Code:
    """What one kernel's code needs on one target.

    Attributes:
        kernel: its name.
        target: e.g. ``sm_90``.
        registers: per thread.
        spilled: bytes (CUDA: of local memory; AMD: registers) per thread; 0 is what one wants.
        shared_bytes: per program.
        code_bytes: of the binary.
    """

    kernel: str
    target: str
    registers: int
    spilled: int
    shared_bytes: int
    code_bytes: int


def kernels(table_dtype: str = "bf16") -> Iterator[tuple[Any, dict[str, Any], dict[str, str]]]:
    """Each kernel with its constants and argument types, for V = 512, h = 2, E = 4."""
    import triton.language as tl

    from ultramem_ds.kernels import triton_programs as programs
    from ultramem_ds.kernels.triton import RUN

    table = dict.fromkeys(("values", "pooled", "grad"), f"*{table_dtype}")
    types = table | dict.fromkeys(_FP32, "*fp32") | dict.fromkeys(_IDS, "*i64")
    types |= dict.fromkeys(_SCALARS, "fp32")
    tile: dict[str, Any] = {"ACCUMULATE": tl.float32, "TILE_V": 512}
    run = {**tile, "RUN": RUN}
    yield programs.pool_rectangular_program, {**tile, "TILE_E": 4}, types
    yield programs.pool_ragged_program, tile, types
    yield programs.entry_dots_program, {"ACCUMULATE": tl.float32, "TILE_C": 256}, types
    yield programs.row_runs_program, run, types
    yield programs.join_runs_program, run, types
    yield programs.row_backward_atomic_program, tile, types
    yield programs.row_adam_program, {"TILE_V": 512}, types | {"grad": "*fp32"}


def compile_for(target: str) -> Iterator[Code]:
    """Compile all kernels for one of ``TARGETS`` or ``AMD_TARGETS``."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    for function, constants, types in kernels():
        signature = {
            name: "constexpr" if name in constants else types.get(name, "i32")
            for name in function.arg_names
        }
        source = ASTSource(function, signature, constexprs=constants)
        compiled = compile(source, target=GPUTarget(*{**TARGETS, **AMD_TARGETS}[target]))
        name = function.__name__
        shared = compiled.metadata.shared
        if target in TARGETS:
            binary = compiled.asm["cubin"]
            registers, spilled = _cuda_usage(binary)
        else:
            binary = compiled.asm["hsaco"]
            registers, spilled = _amd_usage(compiled.asm["amdgcn"])
        yield Code(name, target, registers, spilled, shared, len(binary))


def _cuda_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory, by the ``cuobjdump`` that comes with triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", text)
    assert found is not None, text
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _amd_usage(assembly: str) -> tuple[int, int]:
    """Vector registers, and how many were spilled, from the assembly's notes."""
    found = {name: int(n) for name, n in re.findall(r"\.(vgpr\w*_count):\s+(\d+)", assembly)}
    return found["vgpr_count"], found["vgpr_spill_count"]


def table(codes: list[Code]) -> str:
    """As Markdown."""
    lines = ["| kernel | target | registers | spilled | shared memory (B) | code (B) |"]
    lines.append("|---|---|---|---|---|---|")
    lines += [
        f"| `{c.kernel}` | {c.target} | {c.registers} | {c.spilled} | {c.shared_bytes} "
        f"| {c.code_bytes} |"
        for c in codes
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table([code for name in (*TARGETS, *AMD_TARGETS) for code in compile_for(name)]))
