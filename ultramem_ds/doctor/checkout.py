"""Tests marked ``gpu``, run from the checkout that this package lies in, if it lies in one."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import ultramem_ds

MARK = re.compile(r"^@pytest\.mark\.gpu$", re.MULTILINE)
TIMEOUT_S = 240.0


class NoCheckoutError(Exception):
    """There are no tests here, or nothing to run them with; the message says which."""


def marked_files(but: Sequence[str] = ()) -> list[Path]:
    """Test files that have a test marked ``gpu``, but for those called ``but``.

    Raises:
        NoCheckoutError: the package is installed without its tests, or pytest is missing.
    """
    tests = Path(ultramem_ds.__file__).parents[1] / "tests"
    if not tests.is_dir():
        raise NoCheckoutError("the package is installed without its tests: run in a checkout")
    if importlib.util.find_spec("pytest") is None:
        raise NoCheckoutError("pytest is not installed: pip install -e '.[test]' in the checkout")
    files = sorted(tests.rglob("test_*.py"))
    return [path for path in files if path.name not in but and MARK.search(path.read_text())]


def run_marked(files: Sequence[Path], collect_only: bool) -> str:
    """What pytest says last of the tests marked ``gpu`` in ``files``.

    Raises:
        AssertionError: some test failed; the message names one.
        NoCheckoutError: there are no such files.
    """
    if not files:
        raise NoCheckoutError("no test of this checkout is marked gpu")
    root = Path(ultramem_ds.__file__).parents[1]
    # Without the checkout's own options, which say too little at the end.
    command = [sys.executable, "-m", "pytest", "-o", "addopts=-q", "-p", "no:cacheprovider"]
    command += ["-m", "gpu"]
    command += ["--collect-only"] if collect_only else []
    command += [str(path.relative_to(root)) for path in files]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"no end after {TIMEOUT_S:.0f} s") from None
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode != 0:
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        raise AssertionError((failed or lines or done.stderr.splitlines() or ["no output"])[-1])
    return lines[-1].strip("= ")
