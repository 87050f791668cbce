"""From packages to a corpus in RedPajama's layout, resumable package by package.

``DIR/packages`` keeps the downloads, ``DIR/extracted`` the text of every package, ``DIR/corpus``
what is left of it without near-duplicates, and ``DIR/packages.md`` says what all of it is from.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ultramem_ds.corpus import archives
from ultramem_ds.corpus.fetch import Fetcher
from ultramem_ds.corpus.near_duplicates import NearDuplicates
from ultramem_ds.corpus.packages import PACKAGES, Package
from ultramem_ds.corpus.texts import dictionary, document, fortunes, is_text
from ultramem_ds.telemetry.report import markdown_table
from ultramem_ds.utils.files import read_json, write_json, write_text

MIN_SUBSETS = 5
MAX_PACKAGE_BYTES = 30_000_000  # of text, evenly over its documents: no package is the corpus


@dataclass(frozen=True, kw_only=True)
class Source:
    """One package as it entered the corpus.

    Attributes:
        documents: in the corpus, near-duplicates dropped.
        bytes: of their text as UTF-8.
        dropped: near-duplicates.
    """

    name: str
    version: str
    registry: str
    subset: str
    licence: str
    documents: int = 0
    bytes: int = 0
    dropped: int = 0


def documents_of(package: Package, archive: Path) -> Iterator[tuple[str, str]]:
    """Path inside the package and text of every document."""
    if package.subset == "dictionaries":
        yield from _dictionary_documents(archive)
    elif package.names == ("fortunes",):
        for path, data in archives.files(archive, package.wants):
            for number, text in enumerate(fortunes(data)):
                yield f"{path}#{number}", text
    else:
        for path, data in archives.files(archive, lambda p: is_text(p) and package.wants(p)):
            if (read := document(path, data)) is not None:
                yield path, read


def _dictionary_documents(archive: Path) -> Iterator[tuple[str, str]]:
    found = dict(archives.files(archive, lambda p: p.endswith((".index", ".dict.dz"))))
    for path, entries in found.items():
        if path.endswith(".dict"):
            index = found[path.removesuffix(".dict") + ".index"]
            for number, text in enumerate(dictionary(index, entries)):
                yield f"{path}#{number}", text


def licence_of(name: str, archive: Path) -> str:
    """What the package itself says about its licence."""
    if archive.suffix == ".whl":
        wanted = "*.dist-info/METADATA"
        for _, data in archives.files(archive, lambda p: fnmatch.fnmatch(p, wanted)):
            return archives.wheel_licence(data)
        return "see its LICENSE file"
    path = f"usr/share/doc/{name}/copyright"
    for _, data in archives.files(archive, lambda p: p.removesuffix(".gz") == path):
        return archives.debian_licence(data.decode("utf-8", errors="replace"))
    return "see its copyright file"


def extract(
    directory: Path, packages: Sequence[Package] = PACKAGES
) -> tuple[list[Source], list[str]]:
    """Fetch and read every package that is not there yet.

    Returns:
        What is there, and a line about each package that cannot be had.
    """
    fetcher = Fetcher(directory / "packages")
    sources, missing = [], []
    for package in packages:
        found = fetcher.fetch(package)
        if isinstance(found, str):
            missing.append(f"{' or '.join(package.names)}: {found}")
            print(f"left out: {missing[-1]}", flush=True)
            continue
        name, archive = found
        place = directory / "extracted" / package.subset / f"{name}.jsonl"
        label = place.with_suffix(".json")
        if not label.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            temporary = place.with_suffix(".part")
            size = 0
            with open(temporary, "w", encoding="utf-8") as out:
                for path, text in documents_of(package, archive):
                    meta = {"source": f"{name}/{path}"}
                    out.write(json.dumps({"text": text, "meta": meta}, ensure_ascii=False) + "\n")
                    size += len(text.encode())
            temporary.replace(place)
            source = Source(
                name=name,
                version=archives.version_of(archive),
                registry=package.registry,
                subset=package.subset,
                licence=licence_of(name, archive),
            )
            write_json(label, asdict(source))
            print(f"{package.subset}/{name} {source.version}: {size / 1e6:.1f} MB", flush=True)
        sources.append(Source(**read_json(label)))
    return sources, missing


def deduplicate(directory: Path, sources: Sequence[Source]) -> list[Source]:
    """Write ``corpus`` from ``extracted``, of near-duplicates only the first; all at once.

    Of a package with more than ``MAX_PACKAGE_BYTES`` a share is taken, by a hash of the text.
    """
    final, part = directory / "corpus", directory / "corpus.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    known = NearDuplicates()
    result = []
    for source in sources:
        documents = size = dropped = 0
        place = part / source.subset / f"{source.name}.jsonl"
        place.parent.mkdir(parents=True, exist_ok=True)
        origin = directory / "extracted" / source.subset / f"{source.name}.jsonl"
        share = MAX_PACKAGE_BYTES / origin.stat().st_size
        with open(origin, encoding="utf-8") as lines, open(place, "w", encoding="utf-8") as out:
            for line in lines:
                if zlib.crc32(line.encode()) >= share * 2**32:
                    continue
                text = json.loads(line)["text"]
                if known.seen(text):
                    dropped += 1
                    continue
                out.write(line)
                documents += 1
                size += len(text.encode())
        counted = {"documents": documents, "bytes": size, "dropped": dropped}
        result.append(Source(**{**asdict(source), **counted}))
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    return result


def sources_table(sources: Sequence[Source]) -> str:
    """Packages, versions, licences and sizes as Markdown."""
    rows = [
        [
            s.subset,
            s.name,
            s.version,
            "PyPI" if s.registry == "pypi" else "Debian",
            s.licence.replace("|", "/"),
            f"{s.documents:,}",
            f"{s.dropped:,}",
            f"{s.bytes / 1e6:.1f}",
        ]
        for s in sources
    ]
    header = ["subset", "package", "version", "from", "licence"]
    return markdown_table([*header, "documents", "near-duplicates dropped", "MB of text"], rows)


def write_sources(directory: Path, sources: Sequence[Source], missing: Sequence[str]) -> None:
    """``packages.md`` and ``packages.json``; the latter says that the corpus is finished."""
    total = sum(s.bytes for s in sources)
    text = (
        f"# What this corpus is from\n\n{total / 1e6:.0f} MB of text.\n\n{sources_table(sources)}"
    )
    if missing:
        text += "\nCould not be had: " + "; ".join(missing) + ".\n"
    write_text(directory / "packages.md", text)
    write_json(directory / "packages.json", [asdict(s) for s in sources])
