"""Mistakes with what ``prepare`` and ``train-tokenizer`` read: files, records, options."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from tests.unit.bad_inputs import Case, Command, Scene

FILES = Path(__file__).parents[1] / "data" / "files"
GOOD = b"".join(b'{"text": "document %d"}\n' % number for number in range(200))
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:abab\nsize 4096000\n"
ARRAY = json.dumps([{"text": f"document {number}"} for number in range(9)]).encode()


def prepare(scene: Scene, source: str | Path, *rest: str, tokenizer: str | Path = "") -> list[str]:
    """A ``prepare`` command of one process into a directory that must not become finished."""
    command = [*scene.prepare(scene.root / source), "--workers", "1", *rest]
    if tokenizer:
        command[command.index("--tokenizer") + 1] = str(tokenizer)
    return command


def _alone(what: str, name: str, content: bytes, *names: str) -> Case:
    """A directory with one file that is no data."""

    def command(scene: Scene) -> list[str]:
        return prepare(scene, scene.file(f"in/{name}", content).parent)

    return Case("Files that are no data, alone", what, command, (name, *names))


ALONE = [
    _alone("a file without a byte", "a.jsonl", b"", "0 bytes"),
    _alone("an archive without a byte", "a.jsonl.gz", b"", "0 bytes"),
    _alone("a Git LFS pointer", "a.jsonl", LFS, "Git LFS pointer", "git lfs pull"),
    _alone("a Git LFS pointer under an archive's name", "a.jsonl.zst", LFS, "Git LFS pointer"),
    _alone("a Git LFS pointer under a table's name", "a.parquet", LFS, "Git LFS pointer"),
    _alone("a web page", "a.jsonl", b"<!DOCTYPE html><html>404</html>", "HTML page"),
    _alone("a web page under an archive's name", "a.json.gz", b"<html>404</html>", "HTML page"),
    _alone("a store's refusal", "a.jsonl", b"<?xml version='1.0'?><Error/>", "XML document"),
    _alone("a zip archive", "a.jsonl", b"PK\x03\x04rest", "zip archive", "unpack"),
    _alone("a tar archive inside gzip", "a.jsonl.gz",
           gzip.compress(bytes(257) + b"ustar" + bytes(250)), "tar archive", "unpack"),
    _alone("a 7z archive", "a.jsonl", b"7z\xbc\xaf\x27\x1crest", "7z archive"),
    _alone("a rar archive", "a.jsonl", b"Rar!\x1a\x07rest", "rar archive"),
    _alone("lz4", "a.jsonl", b"\x04\x22\x4d\x18rest", "lz4"),
    _alone("snappy", "a.jsonl", b"\xff\x06\x00\x00sNaPpYrest", "snappy"),
    _alone("an Arrow file", "a.json", b"ARROW1\0\0", "Arrow", "Parquet"),
    _alone("an ORC file", "a.json", b"ORC\1", "ORC", "Parquet"),
    _alone("an Avro file", "a.json", b"Obj\x01", "Avro", "Parquet"),
    _alone("an HDF5 file", "a.json", b"\x89HDF\r\n\x1a\n", "HDF5"),
    _alone("a database", "a.json", b"SQLite format 3\0", "SQLite"),
    _alone("a PDF document", "a.json", b"%PDF-1.7", "PDF"),
    _alone("a picture", "a.json", b"\x89PNG\r\n", "picture"),
    _alone("an index of tokenised data", "a.json", b"MMIDIDX\0\0", "prepare --adopt"),
    _alone("an encrypted table", "a.parquet", b"PARErest", "encrypted"),
    _alone("a table inside gzip", "a.parquet.gz", gzip.compress(b"PAR1rest"), "compressed Parquet"),
    _alone("compressed twice", "a.jsonl.gz", gzip.compress(gzip.compress(GOOD)), "twice"),
    _alone("UTF-16 without a mark", "a.jsonl", GOOD.decode().encode("utf-16-le"),
           "--encoding utf-16-le"),
    _alone("bytes that are no text", "a.jsonl", b"\x01\x02\0\0", "zero bytes"),
    _alone("an unread suffix", "a.csv", b"text\nx\n", "suffix .csv"),
    _alone("no suffix", "part-00000", GOOD, "no suffix"),
    _alone("a download that has not ended", "a.jsonl.gz.part", GOOD, "suffix .part"),
    _alone("a description of a dataset", "dataset_infos.json", b"{}", "beside data"),
    _alone("a hidden file", ".a.jsonl", GOOD, "hidden"),
]  # fmt: skip


def _broken(what: str, name: str, content: bytes, *names: str, rest: tuple[str, ...] = ()) -> Case:
    """A file of the right kind with something wrong."""

    def command(scene: Scene) -> list[str]:
        return prepare(scene, scene.file(name, content), *rest)

    return Case("Damaged and unusual files", what, command, names)


def _table(**columns: list[object]) -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table(columns), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def _long_window(scene: Scene) -> list[str]:
    shutil.copy(FILES / "long31.jsonl.zst", scene.root / "a.jsonl.zst")
    return prepare(scene, "a.jsonl.zst", "--max-zstd-window-mib", "128")


GZIPPED, ZSTD = gzip.compress(GOOD), pa.Codec("zstd").compress(GOOD, asbytes=True)
CUT = "corrupt or cut short"
BROKEN = [
    _broken("gzip cut", "a.jsonl.gz", GZIPPED[:-30], "a.jsonl.gz", CUT),
    _broken("zstd cut", "a.jsonl.zst", ZSTD[:-30], "a.jsonl.zst", CUT),
    _broken("bzip2 cut", "a.jsonl.bz2", bz2.compress(GOOD)[:-30], "a.jsonl.bz2", CUT),
    _broken("xz cut", "a.jsonl.xz", lzma.compress(GOOD)[:-30], "a.jsonl.xz", CUT),
    _broken("a bit of gzip flipped", "a.jsonl.gz", _flipped(GZIPPED, len(GZIPPED) // 2), CUT),
    _broken("the checksum of gzip wrong", "a.jsonl.gz", _flipped(GZIPPED, len(GZIPPED) - 6), CUT),
    _broken("much after the last member", "a.jsonl.gz", GZIPPED + b"x" * 100_000,
            "100000 bytes that are no gzip"),
    Case("Damaged and unusual files", "a zstd window beyond the limit", _long_window,
         ("a.jsonl.zst", "2048 MiB", "--max-zstd-window-mib 128")),
    _broken("a table that is none", "a.parquet", b"PAR1 nonsense", "a.parquet", "Parquet"),
    _broken("a table cut", "a.parquet", _table(text=["a"] * 99)[:-20], "a.parquet", "Parquet"),
    _broken("prose under a table's name", "a.parquet", b"just prose", "a.parquet",
            "not a Parquet file"),
    _broken("a table without text", "a.parquet", _table(title=["a"]), "no text"),
    _broken("a table with text that is none", "a.parquet", _table(text=[1]), "not a string"),
    _broken("an array cut", "a.json", ARRAY[:-1], "a.json", "array is cut short"),
    _broken("an array cut in a record", "a.json", ARRAY[:-20], "a.json", "cannot be read"),
    _broken("an array broken in the middle", "a.json", ARRAY.replace(b"}, {", b"} {x", 1),
            "a.json", "character"),
    _broken("records under a key", "a.json", b'{"data": ' + ARRAY + b"}", "list under data"),
    _broken("records that are lists", "a.jsonl", b'["text"]\n' * 9, "not a JSON object"),
    _broken("a text file that is too long", "a.txt", b"x" * 2_000_000,
            "--text-files line", rest=("--max-line-mib", "1")),
    _broken("too many lines of another encoding", "a.jsonl",
            '{"text": "é"}\n'.encode("cp1252") * 30, "30 x invalid UTF-8", "--max-bad-share"),
    _broken("prose in an archive of unknown content", "a.gz", gzip.compress(b"prose"), "a.gz",
            "neither JSON"),
    _broken("nothing but blank lines", "a.jsonl", b"\n \n", "no document with text in 0 records"),
]  # fmt: skip


def _option(what: str, *words: str, names: tuple[str, ...], content: bytes = GOOD) -> Case:
    def command(scene: Scene) -> list[str]:
        return prepare(scene, scene.file("a.jsonl", content), *words)

    return Case("Options of reading", what, command, names)


OPTIONS = [
    _option("a text key that is not there", "--text-key", "body", names=("no body",)),
    _option("a nested text key that is not there", "--text-key", "a.b", names=("no a.b",)),
    _option("an encoding that is none", "--encoding", "utf-9", names=("utf-9", "cp1252")),
    _option("an encoding of bytes", "--encoding", "base64", names=("base64",)),
    _option("lines of no byte", "--max-line-mib", "0", names=("at least one byte",)),
    _option("a window of no byte", "--max-zstd-window-mib", "0", names=("window", "2048 MiB")),
    _option("a window that zstd cannot", "--max-zstd-window-mib", "4096", names=("2048 MiB",)),
    _option("a text key for chats", "--format", "chat", "--text-key", "x", names=("text key",)),
    _option("a format that is none", "--format", "sft", names=("sft", "completion")),
    _option("text files cut into words", "--text-files", "word", names=("word", "line")),
    _option("a negative validation share", "--validation-share", "-1", names=("-1", "[0, 1)")),
    _option("more bad records than records", "--max-bad-share", "2", names=("2", "[0, 1]")),
    _option("a part in words", "--shard", "a/b", names=("a/b", "I/N")),
    _option("chats that are texts", "--format", "chat", names=("no list of messages",)),
    _option("completions that are texts", "--format", "completion", names=("no prompt",)),
    _option("prompts without answers", "--format", "completion", names=("no completion",),
            content=b'{"prompt": "x"}\n'),
    _option("chats without an assistant", "--format", "chat", names=("no message of an assistant",),
            content=b'{"messages": [{"role": "user", "content": "x"}]}\n'),
    _option("ending documents that are not adopted", "--add-eod", names=("--add-eod", "--adopt")),
    _option("accepting documents that are not adopted", "--accept-no-eod",
            names=("--accept-no-eod", "--adopt")),
]  # fmt: skip


def _inputs(what: str, command: Command, *names: str) -> Case:
    return Case("Directories of input", what, command, names)


def _strict(what: str, name: str, content: bytes, *names: str) -> Case:
    """A good file with another beside it, under ``--strict``."""

    def command(scene: Scene) -> list[str]:
        scene.file("in/good.jsonl", GOOD)
        scene.file(f"in/{name}", content)
        return prepare(scene, "in", "--strict")

    return _inputs(what, command, "--strict", *names)


def _made(build: Callable[[Path], object]) -> Command:
    """``prepare`` of a directory that ``build`` fills."""

    def command(scene: Scene) -> list[str]:
        (scene.root / "in").mkdir()
        build(scene.root / "in")
        return prepare(scene, "in")

    return command


def _two_snapshots(root: Path) -> None:
    for revision in ("aaa", "bbb"):
        (root / "snapshots" / revision).mkdir(parents=True)
        (root / "snapshots" / revision / "x.jsonl").write_bytes(GOOD)
    (root / "blobs").mkdir()


def _twice(scene: Scene) -> list[str]:
    file = scene.file("in/a.jsonl", GOOD)
    return [*prepare(scene, "in"), "--input", str(file)]


def _twice_by_link(scene: Scene) -> list[str]:
    scene.file("in/a.jsonl", GOOD)
    (scene.root / "same").symlink_to("in")
    return [*prepare(scene, "in"), "--input", str(scene.root / "same")]


def _into_itself(scene: Scene) -> list[str]:
    directory = scene.file("in/a.jsonl", GOOD).parent
    return [*prepare(scene, "in"), "--output", str(directory)]


def _without_tokenizer(scene: Scene) -> list[str]:
    command = prepare(scene, scene.file("a.jsonl", GOOD))
    at = command.index("--tokenizer")
    return command[:at] + command[at + 2 :]


def _pipe(scene: Scene) -> list[str]:
    os.mkfifo(scene.root / "pipe")
    return prepare(scene, "pipe")


DIRECTORIES = [
    _inputs("an empty directory", _made(lambda root: None), "it is empty"),
    _inputs("a link to nothing", _made(lambda root: (root / "a.jsonl").symlink_to("b")),
            "link to nothing"),
    _inputs("a directory that is a link to itself",
            _made(lambda root: (root / "a").symlink_to(".")), "read already"),
    _inputs("a pipe in a directory", _made(lambda root: os.mkfifo(root / "a.jsonl")), "pipe"),
    _inputs("a pipe as input", _pipe, "neither a file nor a directory"),
    _inputs("a hub cache with two snapshots", _made(_two_snapshots), "2 snapshots", "aaa, bbb"),
    _inputs("a file given twice", _twice, "a.jsonl is given twice"),
    _inputs("a file given twice through a link", _twice_by_link, "a.jsonl is given twice"),
    _inputs("output into the input itself", _into_itself, "is the output directory"),
    _inputs("prepared data as input", lambda scene: prepare(scene, scene.data()),
            "output of prepare", "train --data"),
    _inputs("no tokenizer", _without_tokenizer, "--tokenizer is missing"),
    _strict("an unread suffix, strictly", "notes.md", b"x", "suffix .md (notes.md)"),
    _strict("a Git LFS pointer, strictly", "lfs.jsonl", LFS, "Git LFS pointer", "lfs.jsonl"),
    _strict("a bad record, strictly", "bad.jsonl", b"nonsense\n", "1 x not JSON"),
    _strict("a file without documents, strictly", "blank.jsonl", b"\n\n", "blank.jsonl"),
    _strict("bytes after an archive, strictly", "a.jsonl.gz", GZIPPED + b"trailer", "7 bytes"),
    _strict("a plain file called .zst, strictly", "a.jsonl.zst", GOOD, "not compressed"),
]  # fmt: skip


def _learn(what: str, *words: str, content: bytes, names: tuple[str, ...]) -> Case:
    def command(scene: Scene) -> list[str]:
        source, output = scene.file("a.jsonl", content), scene.root / "new.json"
        scene.untouched.append(output)
        return ["train-tokenizer", "--input", str(source), "--output", str(output), *words]

    return Case("Training a tokenizer", what, command, names)


LEARN = [
    _learn("no text to learn from", content=b'{"body": "x"}\n',
           names=("1 x no text", "--text-key")),
    _learn("another key than the texts'", "--text-key", "text", content=b'{"body": "x"}\n',
           names=("no text",)),
    _learn("fewer entries than bytes", "--vocab-size", "100", content=GOOD, names=("100", "256")),
    _learn("chats without answers to learn from", "--format", "chat", content=GOOD,
           names=("messages",)),
]  # fmt: skip

TEXTS = [*ALONE, *BROKEN, *OPTIONS, *DIRECTORIES, *LEARN]
