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
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300
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
    """bf16 table, fp32 sums, the widths of the paper's layers."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter replaces the compiler")
    from ultramem_ds.kernels.gpu_code import compile_for

    codes = list(compile_for(target))
    assert len(codes) == 7
    for code in codes:
        assert code.spilled == 0, code
        # 128 threads of 64 registers, 8 programs a multiprocessor: nothing limits occupancy.
        assert code.registers <= 64 and code.shared_bytes <= 1024, code
