"""Packages from Debian and PyPI as files, by the registries' own clients; nothing is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from ultramem_ds.corpus.packages import Package, Registry

TIMEOUT_S = 600.0  # for one package
_SUFFIXES: dict[Registry, str] = {"debian": ".deb", "pypi": ".whl"}
_GIVE_UP_AFTER = 3  # failures of a registry that has given nothing yet


def _command(registry: Registry, name: str) -> list[str]:
    """Downloads ``name`` into the working directory, without what it depends on."""
    if registry == "debian":
        return ["apt-get", "-qq", "download", name]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "1"]
    # Wheels only: a source distribution would run its build to tell its name.
    return [*pip, "--only-binary", ":all:", name]


class Fetcher:
    """Downloads into one directory and keeps what is there.

    Args:
        directory: one folder per package below it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._got: dict[Registry, int] = {"debian": 0, "pypi": 0}
        self._failed: dict[Registry, int] = {"debian": 0, "pypi": 0}

    def fetch(self, package: Package) -> tuple[str, Path] | str:
        """The package's name and file, downloaded unless it is there; or why it cannot be had."""
        reason = f"{package.registry} does not answer"
        for name in package.names:
            for file in self._files(package, name):
                self._got[package.registry] += 1
                return name, file
        for name in package.names:
            if not self._got[package.registry] and self._failed[package.registry] >= _GIVE_UP_AFTER:
                break
            reason = self._download(package, name)
            if not reason:
                self._got[package.registry] += 1
                return name, next(self._files(package, name))
            self._failed[package.registry] += 1
        return reason

    def _files(self, package: Package, name: str) -> Iterator[Path]:
        return (self.directory / name).glob(f"*{_SUFFIXES[package.registry]}")

    def _download(self, package: Package, name: str) -> str:
        """Empty if all went well, else the client's last line."""
        command = _command(package.registry, name)
        if shutil.which(command[0]) is None:
            return f"no {command[0]} on this machine"
        place, final = self.directory / f".{name}", self.directory / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        try:
            done = subprocess.run(
                command, cwd=place, capture_output=True, text=True, timeout=TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            return f"no answer within {TIMEOUT_S:.0f} s"
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["failed without a word"])[-1]
        shutil.rmtree(final, ignore_errors=True)
        place.rename(final)
        return "" if any(self._files(package, name)) else "the client wrote no package"
