"""A launch whose ranks end without a word: the launcher says so, with what libraries said."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.dist.launching import environment

# In place of DeepSpeed's runner: prints what it is told and ends.
RUNNER = """
import os, sys
os.write(1, os.environ["SAYS_OUT"].encode())
os.write(2, os.environ["SAYS_ERR"].encode())
sys.exit(int(os.environ["ENDS"]))
"""
LIBRARY = "[2026-11-25 23:32:58,672] [ERROR] [launch.py:325:sigkill_handler] killed\n"


def launch(tmp_path: Path, out: str, err: str, code: int) -> subprocess.CompletedProcess[str]:
    package = tmp_path / "deepspeed" / "launcher"
    package.mkdir(parents=True)
    (tmp_path / "deepspeed" / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "runner.py").write_text(RUNNER)
    settings = environment(SAYS_OUT=out, SAYS_ERR=err, ENDS=str(code))
    settings["PYTHONPATH"] = f"{tmp_path}:{settings['PYTHONPATH']}"
    return subprocess.run(
        [sys.executable, "-m", "ultramem_ds.launcher", "--num_gpus", "1"],
        env=settings,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("out", "err", "code", "explained"),
    [
        ("", "", 2, True),
        ("step 1\n", LIBRARY, 2, True),
        ("", LIBRARY, 1, True),
        ("a report with failures\n", "", 1, False),
        ("", "error: told\n", 2, False),
        ("", "", 0, False),
    ],
)
def test_silence_is_explained(
    out: str, err: str, code: int, explained: bool, tmp_path: Path
) -> None:
    done = launch(tmp_path, out, err, code)
    assert done.returncode == code
    assert (f"error: the ranks ended with exit code {code}" in done.stderr) is explained
    if explained and err:
        assert LIBRARY.strip() in done.stderr
