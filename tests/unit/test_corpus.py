"""The corpus of packages: archives, texts, near-duplicates, and the whole command offline."""

import gzip
import json
import os
import shutil
import subprocess
import zipfile
from random import Random

import pytest

from ultramem_ds.corpus import __main__ as command
from ultramem_ds.corpus import build
from ultramem_ds.corpus.archives import debian_licence, files, wheel_licence
from ultramem_ds.corpus.fetch import Fetcher
from ultramem_ds.corpus.near_duplicates import NearDuplicates
from ultramem_ds.corpus.packages import PACKAGES, Package
from ultramem_ds.corpus.texts import dictionary, document, fortunes, is_text, text_share

WORDS = ("memory", "layer", "row", "values", "token", "adds", "finds", "reads", "every", "what")
needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb")


def prose(number, words=80):
    """Text of its own for every number."""
    random = Random(number)
    return " ".join(f"{random.choice(WORDS)}{random.randrange(9)}" for _ in range(words))


def make_deb(directory, name, contents):
    """A real package with the given files."""
    root = directory / f"{name}-root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        f"Package: {name}\nVersion: 1:2.0-3\nArchitecture: all\nMaintainer: a <a@b>\n"
        "Description: text\n"
    )
    for path, data in contents.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    file = directory / f"{name}_1%3a2.0-3_all.deb"
    subprocess.run(["dpkg-deb", "--build", str(root), str(file)], check=True, capture_output=True)
    return file


def make_wheel(directory, name, contents):
    """A real wheel that pip takes."""
    file = directory / f"{name}-1.5-py3-none-any.whl"
    info = f"{name}-1.5.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\nLicense-Expression: MIT\n"
    with zipfile.ZipFile(file, "w") as opened:
        for path, text in contents.items():
            opened.writestr(path, text)
        opened.writestr(f"{info}/METADATA", metadata)
        wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        opened.writestr(f"{info}/WHEEL", wheel)
        opened.writestr(f"{info}/RECORD", "")
    return file


def html(text, chrome=""):
    return (
        f"<html><head><title>t</title><script>var x = 1;</script></head><body>{chrome}"
        f"<main><h1>Rows</h1><p>{text}</p></main></body></html>"
    ).encode()


def test_html_becomes_text():
    body = prose(3)
    text = document("usr/share/doc/a/page.html", html(body, "<nav><a href='x'>Next</a></nav>"))
    assert body in text and "var x" not in text and "<" not in text
    latin = "<html><meta charset='iso-8859-1'><body><p>" + "caf\u00e9 " * 60 + "</p></body></html>"
    assert "caf\u00e9" in document("a.html", latin.encode("latin-1"))


def test_what_is_no_text_is_left_out():
    assert document("a.py", b"\xff\xfe" * 300) is None
    assert document("a.py", b"x = 1\n") is None
    assert document("a.c", b"0x00, 0x1f, 0x2a, " * 100) is None
    assert document("a.py", prose(4).encode()) == prose(4) + "\n"
    assert text_share("ab 12") == pytest.approx(0.6)
    for path in ("usr/share/info/x.info-2.gz", "a/b.rst", "a/b.html.en", "a/search.py"):
        assert is_text(path), path
    for path in ("a/genindex.html", "a/_sources/x.html", "a/b.png", "a/b.so"):
        assert not is_text(path), path


def test_dictionary_is_cut_at_its_index():
    """dictd's index counts in base 64: B is 1, BA is 64."""
    entries = b"about\nheadword one\n" + b"word\n" + b"a meaning " * 40
    index = b"00-database-info\tA\tT\nword\tT\tGV\nwords\tT\tGV\n"
    (text,) = dictionary(index, entries)
    assert text.startswith("word\na meaning") and "about" not in text
    assert len(text) == 405 - 1 + 1  # bytes 19 to 423, stripped, one newline


def test_fortunes_are_joined():
    data = "\n%\n".join(f"{prose(i + 2, 60)}" for i in range(40)).encode()
    texts = list(fortunes(data))
    assert len(texts) > 1 and all(len(text) >= 200 for text in texts)
    assert "".join(texts).count("\n\n") + len(texts) == 40
    assert list(fortunes(b"no separator")) == []


def test_near_duplicates():
    known = NearDuplicates()
    text = prose(11, 2000)
    assert not known.seen(text)
    assert known.seen(text)
    assert known.seen(text.replace("token3", "changed", 3))
    assert not known.seen(prose(13, 2000))
    half = " ".join([*text.split()[:1000], *prose(17, 1000).split()])
    assert not known.seen(half)
    assert not known.seen("too short") and not known.seen("too short")


def test_licences():
    text = (
        "Format: https://x\n\nFiles: *\nLicense: GPL-2+\n text\n\nLicense: MIT\n\nLicense: GPL-2+\n"
    )
    assert debian_licence(text) == "GPL-2+, MIT"
    assert debian_licence("This package is free.") == "see its copyright file"
    prose = "License: Permission is hereby granted, free of charge, to any person\nLicense: PSF-2\n"
    assert debian_licence(prose) == "PSF-2"
    assert wheel_licence(b"Name: a\nClassifier: License :: OSI Approved :: BSD License\n\n") == (
        "BSD License"
    )
    assert wheel_licence(b"Name: a\n\n") == "see its LICENSE file"


@needs_dpkg
def test_deb_with_an_archive_inside(tmp_path):
    inner = tmp_path / "linux"
    (inner / "fs").mkdir(parents=True)
    (inner / "fs" / "a.c").write_text(prose(5))
    archive = tmp_path / "linux.tar.xz"
    subprocess.run(["tar", "-C", tmp_path, "-cJf", archive, "linux"], check=True)
    contents = {"usr/src/linux.tar.xz": archive.read_bytes()}
    contents["usr/share/info/b.info.gz"] = gzip.compress(b"text of b")
    deb = make_deb(tmp_path, "source", contents)
    found = dict(files(deb, lambda path: path.endswith((".c", ".info.gz"))))
    assert found == {"linux/fs/a.c": prose(5).encode(), "usr/share/info/b.info": b"text of b"}
    (tmp_path / "torn.deb").write_bytes(deb.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"torn\.deb cannot be read"):
        list(files(tmp_path / "torn.deb", lambda path: True))


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An index of one Debian package and one wheel: a stand-in for apt-get, pip's own folder."""
    index = tmp_path / "index"
    index.mkdir()
    pages = {f"usr/share/doc/manual/{i}.html": html(prose(i + 2, 300)) for i in range(20)}
    pages["usr/share/doc/manual/again.html"] = html(prose(2, 300) + " end")
    pages["usr/share/doc/manual/copyright"] = b"Files: *\nLicense: GFDL-1.3\n"
    make_deb(index, "manual", pages)
    make_wheel(index, "sources", {f"sources/m{i}.py": prose(i + 40, 300) for i in range(20)})
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    (bin_dir / "apt-get").write_text(
        f'#!/bin/sh\ncp {index}/"$3"_*.deb . 2>/dev/null || {{ echo "E: Unable to locate package '
        '$3" >&2; exit 100; }\n'
    )
    (bin_dir / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_dir}:{os.environ['PATH']}")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return tmp_path


PACKAGES_HERE = (
    Package(names=("manual-9", "manual"), registry="debian", subset="reference"),
    Package(names=("absent",), registry="debian", subset="books"),
    Package(names=("sources",), registry="pypi", subset="code", paths=("*.py",)),
)


@needs_dpkg
def test_packages_become_a_corpus(offline, capsys):
    sources, missing = build.extract(offline / "out", PACKAGES_HERE)
    assert [s.name for s in sources] == ["manual", "sources"]
    assert missing == ["absent: E: Unable to locate package absent"]
    sources = build.deduplicate(offline / "out", sources)
    build.write_sources(offline / "out", sources, missing)
    manual, code = sources
    assert (manual.version, manual.licence) == ("1:2.0-3", "GFDL-1.3")
    assert (code.version, code.licence) == ("1.5", "MIT")
    assert (manual.documents, manual.dropped, code.documents) == (20, 1, 20)
    lines = (offline / "out/corpus/code/sources.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["meta"]["source"] == "sources/sources/m0.py"
    table = (offline / "out/packages.md").read_text()
    assert "GFDL-1.3" in table and "absent: E: Unable to locate" in table
    # A second call fetches and reads nothing: the index may be gone.
    shutil.rmtree(offline / "index")
    assert build.extract(offline / "out", PACKAGES_HERE)[0] == [
        build.Source(**{**vars(s), "documents": 0, "bytes": 0, "dropped": 0}) for s in sources
    ]


@needs_dpkg
def test_a_registry_that_gives_nothing_is_given_up(offline):
    fetcher = Fetcher(offline / "out")
    absent = [Package(names=(f"absent{i}",), registry="debian", subset="x") for i in range(4)]
    reasons = [fetcher.fetch(package) for package in absent]
    assert reasons[2] == "E: Unable to locate package absent2"
    assert reasons[3] == "debian does not answer"


def test_too_few_packages_fall_back_to_the_demos_corpus(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "extract", lambda directory: ([], ["a: no apt-get"]))

    def write_corpus(directory):
        directory.mkdir(parents=True, exist_ok=True)
        return {"docs": 2_000_000, "sources": 13_000_000}

    monkeypatch.setattr(command, "write_corpus", write_corpus)
    command.make_corpus(tmp_path / "out", min_mb=300)
    said = capsys.readouterr().out
    assert "Only 0 MB of text in 0 subsets" in said and "the demo's corpus" in said
    assert "standard library" in (tmp_path / "out/packages.md").read_text()
    command.make_corpus(tmp_path / "out", min_mb=300)  # finished: does nothing
    assert capsys.readouterr().out == ""


def test_the_list_spans_five_subsets():
    subsets = [package.subset for package in PACKAGES]
    assert len(set(subsets)) >= 5 and len(PACKAGES) < 120
    names = [name for package in PACKAGES for name in package.names]
    assert len(names) == len(set(names))
