"""No directory of tests is left out by pytest: its default for ``norecursedirs`` has ``dist``."""

from fnmatch import fnmatch
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


def test_every_directory_of_tests_is_collected(request: pytest.FixtureRequest) -> None:
    patterns = request.config.getini("norecursedirs")
    directories = {path.parent for path in TESTS.rglob("test_*.py")}
    assert TESTS / "dist" in directories
    parts = {part for path in directories for part in path.relative_to(TESTS).parts}
    assert not [part for part in parts for pattern in patterns if fnmatch(part, pattern)]
