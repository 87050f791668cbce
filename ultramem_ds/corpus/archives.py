"""The files inside a ``.deb`` or a wheel, streamed: nothing is unpacked to disk or installed."""

from __future__ import annotations

import gzip
import io
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from email.parser import BytesParser
from pathlib import Path

MAX_FILE_BYTES = 4 << 20  # larger files are data, not text that somebody wrote
_TAR_SUFFIXES = (".tar.xz", ".tar.gz", ".tar.zst", ".tar.bz2")
_DICTIONARY_BYTES = 256 << 20
_MAX_LICENCE_NAME = 40  # characters

Wanted = Callable[[str], bool]


def files(archive: Path, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
    """Path and content of every regular file whose path is wanted, tar archives inside included.

    Raises:
        ValueError: if the archive cannot be read.
    """
    try:
        if archive.suffix == ".whl":
            yield from _zip_files(archive, wanted)
            return
        yield from _deb_files(archive, wanted)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{archive} cannot be read: {error}; delete it to fetch it anew") from None


def _zip_files(archive: Path, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            if not info.is_dir() and info.file_size <= MAX_FILE_BYTES and wanted(info.filename):
                yield info.filename, opened.read(info)


def _deb_files(archive: Path, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
    command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as opened:
            yield from _tar_files(opened, wanted)
        process.stdout.read()  # the padding, so that dpkg-deb ends by itself
    if process.returncode:
        raise ValueError(f"{archive} cannot be read: dpkg-deb ended with {process.returncode}")


def _tar_files(opened: tarfile.TarFile, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
    for member in opened:
        path = member.name.removeprefix("./")
        if not member.isfile():
            continue
        file = opened.extractfile(member)
        assert file is not None
        if path.endswith(_TAR_SUFFIXES):
            with tarfile.open(fileobj=file, mode="r|*") as inner:
                yield from _tar_files(inner, wanted)
        elif wanted(path) and (member.size <= MAX_FILE_BYTES or path.endswith(".dict.dz")):
            yield decompressed(path, file.read())


def decompressed(path: str, data: bytes) -> tuple[str, bytes]:
    """Undo one layer of gzip (dictzip too), and drop its suffix from the path."""
    if not path.endswith((".gz", ".dz")):
        return path, data
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        return path[:-3], file.read(_DICTIONARY_BYTES)


def debian_licence(copyright_text: str) -> str:
    """Short licence names of a machine-readable ``debian/copyright``, else where to read it."""
    names = [
        " ".join(line.removeprefix("License:").split())
        for line in copyright_text.splitlines()
        if line.startswith("License:")
    ]
    # Some files begin the licence's text where its short name belongs.
    found = list(dict.fromkeys(name for name in names if 0 < len(name) <= _MAX_LICENCE_NAME))
    return ", ".join(found[:4]) + (", ..." if len(found) > 4 else "") or "see its copyright file"


def wheel_licence(metadata: bytes) -> str:
    """Licence of a wheel's ``METADATA``."""
    headers = BytesParser().parsebytes(metadata, headersonly=True)
    classifiers = [
        value.split(" :: ")[-1]
        for value in headers.get_all("Classifier", [])
        if value.startswith("License ::")
    ]
    named = headers.get("License-Expression") or ", ".join(classifiers)
    stated = str(named or headers.get("License") or "").strip()
    return stated.splitlines()[0][:80] if stated else "see its LICENSE file"


def version_of(archive: Path) -> str:
    """The version that a package's file name tells."""
    version = archive.name.split("_" if archive.suffix == ".deb" else "-")[1]
    return version.replace("%3a", ":")
