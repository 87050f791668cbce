"""``pip install .``, not editable, into a fresh environment: trains from any directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.conftest import RUN_OVERRIDES
from tests.dist.launching import ENVIRONMENT_TO_DROP, ROOT


@pytest.mark.slow
def test_an_installed_package_trains_elsewhere(prepared: Path, tmp_path: Path) -> None:
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    elsewhere.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "ultramem_ds", source / "ultramem_ds", ignore=ignore, symlinks=True)
    shutil.copytree(ROOT / "ds_configs", source / "ds_configs")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    # What it depends on comes from here; its own code must not.
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(site),
    ]
    subprocess.run(
        [*install, "--no-build-isolation", "--no-index", str(source)], check=True, cwd=elsewhere
    )
    (site / "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    kept = {k: v for k, v in os.environ.items() if k not in (*ENVIRONMENT_TO_DROP, "PYTHONPATH")}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(python), *words],
            env={**kept, "OMP_NUM_THREADS": "1"},
            cwd=elsewhere,
            capture_output=True,
            text=True,
        )

    where = run("-c", "import ultramem_ds; print(ultramem_ds.__file__)").stdout
    assert where.startswith(str(site)), where
    train = ["-m", "ultramem_ds", "train", "--preset", "ultramem-debug", "--data", str(prepared)]
    rest = [*RUN_OVERRIDES, "train.stop_at_step=1"]
    done = run(*train, "--run-dir", "own", *rest)
    assert done.returncode == 0, done.stdout + done.stderr
    # The name that messages give, though there is no such directory here.
    named = ["--deepspeed", "ds_configs/cpu_debug.json", "--dry-run", "--run-dir", "named"]
    dry = run(*train, *named, *rest)
    assert dry.returncode == 0 and "ZeRO-3" in dry.stdout, dry.stdout + dry.stderr
    packages = "from ultramem_ds.doctor.software import check_packages as c; print(*c(), sep='\\n')"
    found = run("-c", packages)
    assert found.returncode == 0 and "every required package is there" in found.stdout, found.stderr
