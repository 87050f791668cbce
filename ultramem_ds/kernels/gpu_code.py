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

from ultramem_ds.kernels.tiles import Settings, settings

# Compute capabilities of A100, H100 and H200, B200; and an MI300.
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32)}
AMD_TARGETS = {"gfx942": ("hip", "gfx942", 64)}

# Arguments by name: the rest are numbers.
_TABLE = ("values", "pooled", "grad")
_BF16 = ("x", "state", "taps", "proj", "queries", "norm_weight", "search", "keys")
_IDS = (
    *("rows", "projectors", "offsets", "bags", "sorted_rows", "order"),
    *("groups", "candidates", "rounds", "permutation", "slots"),
)
_FP32 = ("scores", "dots", "grad_values", "partials", "exp_avg", "exp_avg_sq", "cores")
_SCALARS = ("grad_scale", "step_size", "root_correction", "decay", "beta1", "beta2", "eps")
TILES = {"TILE_V", "TILE_O", "TILE_N", "TILE_D", "CHUNK"}  # of the table of tiles
# Numbers that 16 divides for the shapes below, as a launch would find out.
_MULTIPLES = ("V", "C", "D", "num_outputs", "d", "state_stride_t", "state_stride_c")


@dataclass(frozen=True)
class Case:
    """One program at one of the paper's shapes.

    Attributes:
        function: Triton's.
        shape: in the words of the table of tiles.
        constants: but for what that table gives.
        types: of arguments that are not numbers.
        limits: tiles are no larger than what covers these.
    """

    function: Any
    shape: str
    constants: dict[str, Any]
    types: dict[str, str]
    limits: dict[str, int]

    @property
    def program(self) -> str:
        """Its name in the table of tiles."""
        return str(self.function.__name__)

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.program}, {self.shape}"


@dataclass(frozen=True)
class Code:
    """What one kernel's code needs on one target.

    Attributes:
        kernel: its name and shape.
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


def cases(table_dtype: str = "bf16") -> Iterator[Case]:
    """Each program: V = 512, h = 2, E = 4; retrievals of 151M (m 16) and 1.6B (m 42) models."""
    import triton.language as tl

    from ultramem_ds.kernels import triton_finding_programs as finding
    from ultramem_ds.kernels import triton_programs as programs
    from ultramem_ds.kernels.triton import RUN

    types = dict.fromkeys(_TABLE, f"*{table_dtype}") | dict.fromkeys(_BF16, "*bf16")
    types |= dict.fromkeys(_FP32, "*fp32") | dict.fromkeys(_IDS, "*i64")
    types |= dict.fromkeys(_SCALARS, "fp32") | {"begins": "*i1"}
    fp32 = {"ACCUMULATE": tl.float32}
    wide, run = {"TILE_V": 512}, {**fp32, "RUN": RUN}
    yield Case(programs.pool_rectangular_program, "V512", {**fp32, "TILE_E": 4}, types, wide)
    yield Case(programs.pool_ragged_program, "V512", fp32, types, wide)
    yield Case(programs.entry_dots_program, "V256", fp32, types, {"TILE_V": 256})
    yield Case(programs.row_runs_program, "V512", run, types, wide)
    yield Case(programs.join_runs_program, "V512", run, types, wide)
    yield Case(programs.row_backward_atomic_program, "V512", fp32, types, wide)
    yield Case(programs.row_adam_program, "V512", {}, types | {"grad": "*fp32"}, wide)
    for tokens in (1, 16):
        conv = {"REACH": 3, "HAS_BEGINS": False, "begins": None, "TILE_T": tokens}
        yield Case(finding.convolve_project_program, f"T{tokens} D1024", conv, types, {})
        for width, best, keys in ((256, 16, 2200), (512, 64, 3584)):
            search = {"NORM": "layernorm", "DIRECTIONS": 1, "M": best, "TILE_T": tokens}
            shape = f"T{tokens} d{width} m{best}"
            yield Case(finding.search_program, shape, search, types, {"TILE_N": keys})
    layer = {"REACH": 3, "ROUNDS": 4, "PERMUTED": False, "permutation": None}
    tucker = {"NORM": "layernorm", "HAS_CORES": True, "SOFTMAX": False, "RANKS": 2} | layer
    yield Case(finding.select_program, "d256 m16", {**tucker, "M": 16}, types, {"CHUNK": 1024})
    yield Case(finding.select_program, "d512 m64", {**tucker, "M": 64}, types, {"CHUNK": 2048})
    nothing = ("norm_weight", "cores", "permutation", "x", "state")
    product = {"NORM": "none", "HAS_CORES": False, "SOFTMAX": True, "RANKS": 1} | layer
    product |= {"REACH": 0, "M": 64, **dict.fromkeys(nothing)}
    yield Case(finding.select_program, "d1024 m64", product, types, {"CHUNK": 2048})


def compile_for(target: str) -> Iterator[Code]:
    """Compile all programs for one of ``TARGETS`` or ``AMD_TARGETS``, with the table's tiles."""
    for case in cases():
        yield compile_case(case, target, settings(case.program, case.shape, target))


def compile_case(case: Case, target: str, tiles: Settings) -> Code:
    """Compile one program with these tiles, warps and stages."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    options = {name: size for name, size in tiles.items() if name.startswith("num_")}
    constants = case.constants | {
        name: min(size, case.limits.get(name, size))
        for name, size in tiles.items()
        if name not in options
    }
    names = case.function.arg_names
    signature = {
        name: "constexpr" if name in constants else case.types.get(name, "i32") for name in names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or (name in _MULTIPLES and signature[name] == "i32")
    }
    source = ASTSource(case.function, signature, constexprs=constants, attrs=aligned)
    gpu = GPUTarget(*{**TARGETS, **AMD_TARGETS}[target])
    compiled = compile(source, target=gpu, options=options)
    shared = compiled.metadata.shared
    if target in TARGETS:
        binary = compiled.asm["cubin"]
        registers, spilled = _cuda_usage(binary)
    else:
        binary = compiled.asm["hsaco"]
        registers, spilled = _amd_usage(compiled.asm["amdgcn"])
    return Code(case.label, target, registers, spilled, shared, len(binary))


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
