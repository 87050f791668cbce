"""What people keep below an input directory: read for what it is, or named in the account."""

import bz2
import gzip
import json
import lzma
import os
import shutil
import socket
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.unit.data_corpus import lines_of, make_texts, small_tokenizer
from ultramem_ds.data import sources
from ultramem_ds.data.inspect import describe
from ultramem_ds.data.manifest import load_manifest
from ultramem_ds.data.options import ReadOptions
from ultramem_ds.data.prepare import PrepareConfig, prepare
from ultramem_ds.data.readers import BadRecord, Document, Remark, read_unit
from ultramem_ds.data.sources import survey
from ultramem_ds.data.walk import walk

FILES = Path(__file__).parents[1] / "data" / "files"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:abab\nsize 4096000\n"
TEXTS = make_texts(0, 20)
LINES = lines_of({"text": text} for text in TEXTS)


def look(root, **options):
    """(texts, bad records' reasons, remarks, reason by skipped name, note by file) below a path."""
    reading = ReadOptions(**options)
    found = survey([str(root)], reading)
    records = [record for unit in found.units for record in read_unit(unit, reading)]
    return (
        [record.text for record in records if isinstance(record, Document)],
        [record.reason for record in records if isinstance(record, BadRecord)],
        [record.text for record in records if isinstance(record, Remark)],
        {entry.name: entry.reason for entry in found.skipped},
        dict(found.notes),
    )


def put(path, content=LINES):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


SPELLINGS = {
    "A.JSONL": LINES,
    "b.jsonl.gzip": gzip.compress(LINES),
    "c.jsonl.bz2": bz2.compress(LINES),
    "d.jsonl.xz": lzma.compress(LINES),
    "e.ndjson": LINES,
    "f.jsonlines": LINES,
    "g.JSON.GZ": gzip.compress(LINES),
    "h.jsonl.lzma": lzma.compress(LINES, lzma.FORMAT_ALONE),
    "i.gz": gzip.compress(LINES),
    "j.jl": LINES,
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_a_suffix_is_read(tmp_path, name):
    put(tmp_path / name, SPELLINGS[name])
    assert look(tmp_path) == (TEXTS, [], [], {}, {})


def test_text_files_are_one_document_or_one_per_line(tmp_path, monkeypatch):
    put(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\n\r\n two\n")
    put(tmp_path / "b.TXT.bz2", bz2.compress(b"three"))
    assert look(tmp_path)[0] == ["one\r\n\r\n two\n", "three"]
    assert look(tmp_path, text_files="line")[0] == ["one", " two", "three"]
    put(tmp_path / "b.TXT.bz2", bz2.compress(b"x" * 5000))
    (reason,) = look(tmp_path, max_line_bytes=4000)[1]
    assert "longer than 4000" in reason and "--text-files line" in reason
    put(tmp_path / "b.TXT.bz2", bz2.compress(b"three"))
    monkeypatch.setattr(sources, "_MIN_UNIT_BYTES", 4)
    assert look(tmp_path, text_files="line")[0] == ["one", " two", "three"], "in byte ranges"
    put(tmp_path / "c.txt", LINES)
    assert look(tmp_path / "c.txt")[0] == TEXTS, "JSON lines are not taken for a text"
    assert "JSON" in look(tmp_path)[4]["c.txt"]


NOT_READ = {
    "notes.docx": (b"text", "suffix .docx"),
    "README": (b"text", "no suffix"),
    "x.jsonl.tmp": (LINES, "suffix .tmp"),
    "dataset_infos.json": (b"{}", "beside data"),
    "README.txt": (b"text", "beside data"),
    "empty.jsonl": (b"", "0 bytes"),
    "empty.parquet": (b"", "0 bytes"),
    "empty.jsonl.zst": (b"", "0 bytes"),
    "lfs.jsonl": (LFS, "Git LFS"),
    "lfs.jsonl.gz": (LFS, "Git LFS"),
    "lfs.parquet": (LFS, "Git LFS"),
    "lfs.txt": (LFS, "Git LFS"),
    "page.jsonl": (b"\n<!DOCTYPE html>\n<html></html>", "HTML"),
    "page.parquet": (b"<html><body>404", "HTML"),
    "denied.jsonl.gz": (b"<?xml version='1.0'?><Error><Code>AccessDenied", "XML"),
    "a.jsonl.gz": (b"PK\x03\x04zip", "zip"),
    "b.json": (b"%PDF-1.7", "PDF"),
    "c.jsonl": (b"\x04\x22\x4d\x18lz4", "lz4"),
    "twice.jsonl.gz": (gzip.compress(gzip.compress(LINES)), "twice"),
    "tar.jsonl.gz": (gzip.compress(b"\0" * 257 + b"ustar" + b"\0" * 300), "tar"),
    "wide.jsonl": (LINES.decode().encode("utf-16-le"), "--encoding utf-16-le"),
    "wide-be.jsonl": (LINES.decode().encode("utf-16-be"), "--encoding utf-16-be"),
    "noise.jsonl": (b"\x01\x02\0\0\x03", "zero bytes"),
    "prose.gz": (gzip.compress(b"just prose"), "neither JSON"),
}


@pytest.mark.parametrize("name", NOT_READ)
def test_what_is_not_data_is_named_for_what_it_is(tmp_path, name):
    content, reason = NOT_READ[name]
    put(tmp_path / "good.jsonl")
    put(tmp_path / name, content)
    texts, bad, _, skipped, _ = look(tmp_path)
    assert (texts, bad) == (TEXTS, [])
    assert reason in skipped[name]
    with pytest.raises(ValueError, match="holds no file to read"):
        survey([str(put(tmp_path / "alone" / name, content).parent)])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("archive", [bytes, gzip.compress])
def test_byte_order_marks_are_read(tmp_path, encoding, archive):
    text = '{"text": "Zürich €5 北京"}\n{"text": "b"}\n'
    put(tmp_path / "x.jsonl", archive(text.encode(encoding)))
    assert look(tmp_path)[:2] == (["Zürich €5 北京", "b"], [])


def test_marks_of_files_that_were_joined(tmp_path):
    line = b'\xef\xbb\xbf{"text": "a"}\n'
    put(tmp_path / "x.jsonl", line * 3)
    assert look(tmp_path)[:2] == (["a"] * 3, [])


def test_other_encodings_are_given_by_name(tmp_path):
    put(tmp_path / "x.jsonl", '{"text": "naïve"}\n{"text": "€"}\n'.encode("cp1252"))
    assert look(tmp_path)[:2] == ([], ["invalid UTF-8"] * 2)
    assert look(tmp_path, encoding="cp1252")[:2] == (["naïve", "€"], [])
    put(tmp_path / "x.jsonl", '{"text": "北"}\n'.encode("gb18030") + b'{"text": "\xff"}\n')
    assert look(tmp_path, encoding="GB18030")[:2] == (["北"], ["invalid gb18030"])
    put(tmp_path / "x.jsonl", '{"text": "a"}\n'.encode("utf-16-le"))
    assert look(tmp_path, encoding="utf-16-le")[0] == ["a"]
    for name in ("utf-9", "base64"):
        with pytest.raises(ValueError, match=name):
            ReadOptions(encoding=name)


def test_a_long_zstd_window_is_read_within_a_stated_limit(tmp_path):
    path = shutil.copy(FILES / "long31.jsonl.zst", tmp_path)
    assert len(look(tmp_path)[0]) == 100
    with pytest.raises(ValueError, match="2048 MiB of memory, more than --max-zstd-window-mib 128"):
        look(path, max_zstd_window_bytes=128 << 20)


def test_several_members_and_what_follows_them(tmp_path):
    half = LINES.index(b"\n", len(LINES) // 2) + 1
    for suffix, compress in (("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)):
        members = compress(LINES[:half]) + compress(LINES[half:])
        path = put(tmp_path / f"x.jsonl.{suffix}", members + b"\0" * 512)
        assert look(path)[:3] == (TEXTS, [], []), "padding is nothing to talk about"
        put(path, members + b"trailer of some tool")
        texts, bad, remarks, *_ = look(path)
        assert (texts, bad) == (TEXTS, []) and "20 bytes after the" in remarks[0]
        put(path, members + b"x" * 100_000)
        with pytest.raises(ValueError, match="100000 bytes that are no"):
            look(path)
        put(path, members[:-12])
        with pytest.raises(ValueError, match="corrupt or cut short"):
            look(path)


def test_the_content_decides_over_the_name(tmp_path):
    put(tmp_path / "plain.jsonl.zst")
    put(tmp_path / "packed.jsonl", gzip.compress(LINES))
    put(tmp_path / "lines.parquet")
    texts, bad, _, skipped, notes = look(tmp_path)
    assert (texts, bad, skipped) == (TEXTS * 3, [], {})
    assert notes["plain.jsonl.zst"].startswith("not compressed")
    assert notes["packed.jsonl"].startswith("gzip")
    assert notes["lines.parquet"].startswith("JSON")


def test_json_layouts(tmp_path):
    rows = [{"text": text} for text in TEXTS]
    compact = [json.dumps(row) for row in rows]
    for content in (
        json.dumps(rows),
        json.dumps(rows, indent=2),
        "[\n" + ",\n".join(compact) + "\n]\n",
        "\n".join(json.dumps(row, indent=1) for row in rows),
        "".join(compact),
        "\n".join(a + b for a, b in zip(compact[::2], compact[1::2])),
        "\n".join(f"[{line}]" for line in compact),
        "\n\n".join(compact),
    ):
        for archive in (bytes, gzip.compress):
            path = put(tmp_path / "x.json", archive(content.encode()))
            assert look(path)[:2] == (TEXTS, []), content[:60]
    put(path, json.dumps({"data": rows}).encode())
    assert look(path)[1] == [
        "no text / raw_content / content, but a list under data: write one a line"
    ]
    put(path, json.dumps(rows).encode()[:-40])
    with pytest.raises(ValueError, match=r"x\.json: the record that begins at character \d+ is no"):
        look(path)
    put(path, json.dumps(rows).encode()[:-1])
    with pytest.raises(ValueError, match="array is cut short"):
        look(path)


def test_an_array_larger_than_a_block_is_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr("ultramem_ds.data.streams.BLOCK_BYTES", 64)
    put(tmp_path / "x.json", json.dumps([{"text": text} for text in TEXTS]).encode())
    assert look(tmp_path)[0] == TEXTS
    with pytest.raises(ValueError, match="longer than --max-line-mib"):
        look(tmp_path, max_line_bytes=50)


def test_the_text_of_a_record(tmp_path):
    path = put(tmp_path / "x.jsonl", lines_of([{"text": None, "content": "c"}, {"text": None}]))
    assert look(path)[:2] == (["c"], ["text is not a string"])
    put(path, lines_of([{"doc": {"text": "n"}}, {"doc.text": "d"}, {"doc": 1}]))
    assert look(path, text_key="doc.text")[:2] == (["n", "d"], ["no doc.text"])


def test_parquet_without_rows_and_nested_columns(tmp_path):
    schema = pa.schema([("text", pa.string())])
    parquet.write_table(schema.empty_table(), tmp_path / "none.parquet")
    with parquet.ParquetWriter(tmp_path / "gap.parquet", schema) as out:
        for texts in (TEXTS[:5], [], TEXTS[5:]):
            out.write_table(pa.table({"text": texts}, schema))
    with parquet.ParquetWriter(tmp_path / "nothing.PARQUET", schema):
        pass
    assert look(tmp_path)[:2] == (TEXTS, [])
    nested = pa.table({"doc": [{"text": "n", "other": 1}], "meta": [{"redpajama_set_name": None}]})
    parquet.write_table(nested, tmp_path / "nested.parquet")
    assert look(tmp_path / "nested.parquet", text_key="doc.text")[:2] == (["n"], [])
    assert look(tmp_path / "nested.parquet")[1] == ["no text / raw_content / content"]


def test_links_are_followed_and_nothing_is_read_twice(tmp_path):
    put(tmp_path / "disk2/arxiv/a.jsonl", lines_of([{"text": "a"}]))
    put(tmp_path / "disk2/w.jsonl", lines_of([{"text": "w"}]))
    put(tmp_path / "in/c4/c.jsonl", lines_of([{"text": "c"}]))
    root = tmp_path / "in"
    (root / "arxiv").symlink_to("../disk2/arxiv")
    (root / "arxiv-again").symlink_to("../disk2/arxiv")
    (root / "wikipedia.jsonl").symlink_to("../disk2/w.jsonl")
    (root / "cycle").symlink_to(".")
    (root / "c4/up").symlink_to("..")
    (root / "gone.jsonl").symlink_to("nowhere")
    (root / "self").symlink_to("self")
    (root / "a-copy-of-c.jsonl").symlink_to("c4/c.jsonl")
    texts, _, _, skipped, _ = look(root)
    assert sorted(texts) == ["a", "c", "w"]
    assert {unit.subset for unit in survey([str(root)]).units} == {"arxiv", "c4", "wikipedia"}
    assert skipped == {
        "arxiv-again/": "link to arxiv, which is read already",
        "cycle/": "link to ., which is read already",
        "c4/up/": "link to ., which is read already",
        "gone.jsonl": "link to nothing",
        "self": "link to nothing",
        "a-copy-of-c.jsonl": "link to c4/c.jsonl, which is read already",
    }


def test_hidden_entries_pipes_and_names_that_are_not_text(tmp_path):
    put(tmp_path / "a.jsonl")
    put(tmp_path / ".git/x.jsonl")
    put(tmp_path / ".hidden.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.path.relpath(tmp_path / "s.jsonl"))
    os.close(os.open(os.fsencode(tmp_path) + b"/b\xff.docx", os.O_CREAT))
    tree = walk(tmp_path, {})
    assert [str(path) for path in tree.files] == ["a.jsonl", "b\udcff.docx"]
    skipped = look(tmp_path)[3]
    assert skipped[".git/"] == skipped[".hidden.jsonl"] == "hidden"
    assert "pipe" in skipped["pipe.jsonl"] and "pipe" in skipped["s.jsonl"]
    assert skipped["b\\xff.docx"] == "suffix .docx"


def hub_cache(root, revisions, main=None):
    for revision in revisions:
        blob = put(root / f"blobs/{revision}", lines_of([{"text": revision}]))
        link = root / f"snapshots/{revision}/train.jsonl"
        link.parent.mkdir(parents=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    put(root / "blobs/x.incomplete", b"half")
    (root / "refs").mkdir()
    if main:
        (root / "refs/main").write_text(main)


def test_one_snapshot_of_a_hub_cache_is_read(tmp_path):
    root = tmp_path / "hub/datasets--owner--name"
    hub_cache(root, ["aaa", "bbb"], main="aaa")
    for below in (tmp_path / "hub", root, root / "snapshots"):
        texts, _, _, skipped, _ = look(below)
        assert texts == ["aaa"]
        assert any("another snapshot" in reason for reason in skipped.values())
    assert "unfinished download of a hub cache" in look(root)[3].values()
    assert look(root / "snapshots/bbb")[0] == ["bbb"]
    (root / "refs/main").unlink()
    with pytest.raises(ValueError, match="2 snapshots of one dataset.*give one as --input"):
        look(root)


@pytest.fixture
def tokenizer(tmp_path):
    return small_tokenizer().save(tmp_path)


def everything(root):
    """One directory with every case at once: (documents, bad records, skipped entries)."""
    for name, content in SPELLINGS.items():
        put(root / "spellings" / name, content)
    for name, (content, _) in NOT_READ.items():
        put(root / "foreign" / name, content)
    put(root / "text/prose.txt", b"a text of its own")
    put(root / "bom/x.jsonl", b"\xef\xbb\xbf" + LINES)
    put(root / "wide/x.jsonl", LINES.decode().encode("utf-16"))
    put(root / "trailing.jsonl.gz", gzip.compress(LINES) + b"trailer")
    put(root / "plain.jsonl.zst")
    put(root / "array.json", json.dumps([{"text": text} for text in TEXTS]).encode())
    put(root / "bad.jsonl", b'nonsense\n{"title": "no text"}\n' + LINES)
    put(root / "blank.jsonl", b"\n \n")
    (root / "long").mkdir()
    shutil.copy(FILES / "long31.jsonl.zst", root / "long")
    (root / "tables").mkdir()
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), root / "tables/none.parquet")
    put(root.with_name("elsewhere") / "y.jsonl")
    (root / "linked").symlink_to(root.with_name("elsewhere"))
    (root / "cycle").symlink_to(".")
    (root / "gone").symlink_to("nowhere")
    put(root / ".cache/x.jsonl")
    os.mkfifo(root / "pipe")
    documents = len(TEXTS) * (len(SPELLINGS) + 7) + 1 + 100
    return documents, 2, len(NOT_READ) + 4


def test_the_account_of_every_case_at_once_adds_up(tmp_path, tokenizer):
    root = tmp_path / "in"
    documents, bad, skipped = everything(root)
    output = root / "prepared"  # below its own input
    config = PrepareConfig(validation_share=0.1)
    manifest = prepare([root], output, tokenizer, config)
    assert manifest is not None
    account = manifest.account
    on_disk = sum(
        not path.is_dir() or path.is_symlink()
        for path in root.rglob("*")
        if output not in path.parents and ".cache" not in path.parts
    )
    assert account["entries"] == account["read"] + sum(map(len, account["skipped"].values()))
    assert account["entries"] == on_disk + 1, "the hidden directory is one entry, a link is another"
    assert sum(map(len, account["skipped"].values())) == skipped
    assert account["documents"] == documents == sum(i.documents for i in manifest.subsets)
    assert account["text_bytes"] == sum(info.text_bytes for info in manifest.subsets)
    assert manifest.records == documents + bad and sum(manifest.bad_records.values()) == bad
    assert set(account["without_documents"]) == {"blank.jsonl", "tables/none.parquet"}
    assert any("trailing.jsonl.gz: 7 bytes after" in note for note in account["notes"])
    assert any("plain.jsonl.zst: not compressed" in note for note in account["notes"])
    shown = "\n".join(describe(output))
    for reason in account["skipped"]:
        assert reason in shown
    # The second call finds its own output below its input.
    assert prepare([root], output, tokenizer, config) == load_manifest(output)
    with pytest.raises(ValueError, match="--strict: .*Git LFS"):
        prepare([root], output, tokenizer, PrepareConfig(validation_share=0.1, strict=True))


def test_strict_lets_nothing_pass(tmp_path, tokenizer):
    strict = PrepareConfig(strict=True, validation_share=0)
    good = put(tmp_path / "in/a.jsonl")
    assert prepare([tmp_path / "in"], tmp_path / "in/out", tokenizer, strict) is not None
    for number, (name, content, problem) in enumerate(
        [
            ("notes.md", b"x", "suffix .md"),
            ("b.jsonl", b"nonsense\n", "1 of the 21 records"),
            ("b.jsonl", b"\n\n", "no document in b.jsonl"),
            ("b.jsonl.gz", gzip.compress(LINES) + b"trailer", "7 bytes after"),
            ("b.jsonl.zst", LINES, "not compressed"),
        ]
    ):
        root = tmp_path / f"strict-{number}"
        put(root / "a.jsonl", good.read_bytes())
        put(root / name, content)
        with pytest.raises(ValueError, match=f"--strict: .*{problem}"):
            prepare([root], tmp_path / f"out-{number}", tokenizer, strict)
        assert not (tmp_path / f"out-{number}/manifest.json").exists()
        lax = PrepareConfig(validation_share=0)
        assert prepare([root], tmp_path / f"out-{number}", tokenizer, lax) is not None
        with pytest.raises(ValueError, match=f"--strict: .*{problem}"):
            prepare([root], tmp_path / f"out-{number}", tokenizer, strict)


def test_outputs_are_no_inputs(tmp_path, tokenizer):
    put(tmp_path / "in/a.jsonl")
    for name in ("one", "two"):
        prepare([tmp_path / "in"], tmp_path / "in" / name, tokenizer)
        prepare([tmp_path / "in"], tmp_path / "in" / name, tokenizer)
    assert load_manifest(tmp_path / "in/two").account["not_input"] == {
        "output of prepare": ["one/"]
    }
    found = survey([str(tmp_path / "in")], None, {tmp_path / "in/two": "the output directory"})
    assert {entry.name for entry in found.skipped} == {"one/", "two/"}
    with pytest.raises(ValueError, match="is the output directory"):
        prepare([tmp_path / "in"], tmp_path / "in", tokenizer)
    shutil.copy(tokenizer, tmp_path / "in/t.json")
    manifest = prepare([tmp_path / "in"], tmp_path / "out", tmp_path / "in/t.json")
    assert manifest is not None and manifest.account["not_input"]["the tokenizer"] == ["t.json"]
