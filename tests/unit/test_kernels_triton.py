"""The Triton kernels: results under Triton's interpreter, and that they compile for a GPU.

The interpreter is chosen when triton's functions are defined, so these tests run in a process of
their own that has TRITON_INTERPRET=1 from the start.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CHECKS = ["triton", "finding"]
REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("checks", CHECKS)
def test_triton_kernels_under_the_interpreter(checks):
    pytest.importorskip("triton")
    run_checks(checks, TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("checks", CHECKS)
def test_triton_kernels_on_the_gpu(checks):
    run_checks(checks)


def run_checks(checks, **settings):
    environment = {
        **{key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
        **settings,
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
    }
    environment.pop("ULTRAMEM_KERNEL", None)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    command.append(str(Path(__file__).with_name(f"kernels_{checks}_checks.py")))
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    "target",
    [
        "sm_90",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("sm_80", "sm_100", "gfx942")),
    ],
)
def test_triton_kernels_compile_without_a_gpu_and_spill_nothing(target):
    """bf16 table, fp32 sums, the widths of the paper's layers, each row of the table of tiles."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter replaces the compiler")
    from ultramem_ds.kernels.gpu_code import compile_for

    codes = list(compile_for(target))
    assert len(codes) == 16
    for code in codes:
        assert code.spilled == 0, code
        if "V" in code.kernel.split()[-1]:
            # 128 threads of 64 registers, 8 programs a multiprocessor: nothing limits occupancy.
            assert code.registers <= 64 and code.shared_bytes <= 4096, code
        else:
            # A retrieval is a few hundred programs: one or two a multiprocessor, in its limits.
            assert code.registers <= 192 and code.shared_bytes <= 48 << 10, code


def test_the_table_of_tiles_is_whole():
    """Each row is well-formed and taken by a program at one of the shapes compiled above."""
    pytest.importorskip("triton")
    from ultramem_ds.kernels import gpu_code, tiles

    rows, targets = tiles.read(), {**gpu_code.TARGETS, **gpu_code.AMD_TARGETS}
    cases = list(gpu_code.cases())
    assert len({(row.program, row.gpu, row.shape) for row in rows}) == len(rows)
    for row in rows:
        assert row.gpu == tiles.ANY or row.gpu in targets, row
        assert all(size & (size - 1) == 0 for name, size in row.settings.items() if "TILE" in name)
        assert row.settings["num_warps"] in (1, 2, 4, 8) and row.settings["num_stages"] >= 1
        gpu = "sm_90" if row.gpu == tiles.ANY else row.gpu
        taken = [c for c in cases if tiles.settings(c.program, c.shape, gpu) == row.settings]
        assert any(c.program == row.program for c in taken), row
    for case in cases:
        wanted = set(tiles.settings(case.program, case.shape, "sm_90")) - {
            "num_warps",
            "num_stages",
        }
        assert wanted == set(case.function.arg_names) & gpu_code.TILES, case.label


def test_a_gpus_own_row_goes_before_those_of_any(monkeypatch):
    from ultramem_ds.kernels import tiles

    rows = [
        tiles.Row("p", "*", "*", {"TILE_V": 1}),
        tiles.Row("p", "sm_90", "V5*", {"TILE_V": 2}),
    ]
    monkeypatch.setattr(tiles, "_table", lambda: rows)
    look_up = tiles._look_up.__wrapped__
    assert look_up("p", "V512", "sm_90") == {"TILE_V": 2}
    assert look_up("p", "V256", "sm_90") == look_up("p", "V512", "sm_80") == {"TILE_V": 1}
    with pytest.raises(LookupError, match="no tiles for q at V512"):
        look_up("q", "V512", "sm_90")
