"""Mistakes with tokenizers, adopted pairs, added validation, and where a model meets data."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.unit.bad_input_texts import FILES, GOOD, LFS, prepare
from tests.unit.bad_inputs import Case, Command, Scene
from ultramem_ds.data.indexed import IndexedDataset, IndexedWriter

TIKTOKEN = b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256))


def _tokenizer(what: str, name: str, content: bytes, *names: str) -> Case:
    """A file that ``prepare`` is given as the tokenizer."""

    def command(scene: Scene) -> list[str]:
        file = scene.file(f"t/{name}", content)
        return prepare(scene, scene.file("a.jsonl", GOOD), tokenizer=file)

    return Case("Tokenizers", what, command, (name, *names))


def _beside(what: str, *names: str, rest: tuple[str, ...] = (), **files: Any) -> Case:
    """A good tokenizer with other files beside it."""

    def command(scene: Scene) -> list[str]:
        for name, value in files.items():
            scene.file(f"t/{name}.json", value)
        shutil.copy(scene.prepared / "tokenizer.json", scene.root / "t")
        return prepare(scene, scene.file("a.jsonl", GOOD), *rest, tokenizer=scene.root / "t")

    return Case("Tokenizers", what, command, names)


def _without_end(scene: Scene) -> list[str]:
    renamed = (scene.prepared / "tokenizer.json").read_text().replace("<|endoftext|>", "<mine>")
    file = scene.file("mine.json", renamed)
    return prepare(scene, scene.file("a.jsonl", GOOD), tokenizer=file)


def _recorded(name: str, *rest: str, text: bytes = GOOD) -> Command:
    """A tokenizer of tests/data."""

    def command(scene: Scene) -> list[str]:
        file = scene.file(name, (FILES / name).read_bytes())
        return prepare(scene, scene.file("a.jsonl", text), *rest, tokenizer=file)

    return command


def _merges_alone(scene: Scene) -> list[str]:
    scene.file("t/merges.txt", "")
    directory = scene.file("t/vocab.json", "{}").parent
    return prepare(scene, scene.file("a.jsonl", GOOD), tokenizer=directory)


TOKENIZERS = [
    _tokenizer("a tiktoken vocabulary", "tokenizer.model", TIKTOKEN, "tiktoken", "tokenizer.json"),
    _tokenizer("a bare vocabulary", "vocab.json", b'{"a": 0, "b": 1}', "bare vocabulary"),
    _tokenizer("Mistral's format", "tekken.json", b'{"config": {}, "vocab": []}', "tekken"),
    _tokenizer("a configuration", "tokenizer_config.json", b'{"eos_token": "x"}', "configuration"),
    _tokenizer("a pointer instead of a tokenizer", "t.json", LFS, "Git LFS pointer"),
    _tokenizer("a web page instead of a tokenizer", "t.json", b"<html></html>", "HTML page"),
    _tokenizer("an empty tokenizer", "t.json", b"", "empty"),
    _tokenizer("a tokenizer in UTF-16", "t.json", "{}".encode("utf-16"), "UTF-16"),
    _tokenizer("a compressed tokenizer", "t.json", gzip.compress(b"{}"), "gzip"),
    _tokenizer("a torn tokenizer", "t.json", b'{"model": {"type"', "not a usable tokenizer"),
    _tokenizer("a SentencePiece model that is none", "t.model", b"\x00nonsense", "not a usable"),
    _tokenizer("no JSON of a tokenizer", "t.json", b'{"model": {}}', "not a usable tokenizer"),
    Case("Tokenizers", "no end-of-text token", _without_end, ("mine.json", "--eod-token")),
    Case("Tokenizers", "a vocabulary and merges alone", _merges_alone,
         ("merges.txt", "transformers")),
    Case("Tokenizers", "no unknown token", _recorded("unigram_nounk.json"),
         ("unigram_nounk.json", "cannot encode 'E'", "unknown token")),
    Case("Tokenizers", "characters dropped, strictly",
         _recorded("charbpe_nounk.json", "--strict", text='{"text": "北"}\n'.encode()),
         ("--strict", "drops characters", "1 x '北'")),
    _beside("an end-of-text token that is not there", "no token '<gone>'",
            rest=("--eod-token", "<gone>"), tokenizer_config={}),
    _beside("a configuration of another tokenizer", "tokenizer_config.json names '<gone>'",
            tokenizer_config={"eos_token": "<gone>"}),
    _beside("a map of another tokenizer", "special_tokens_map.json names '<gone>'",
            special_tokens_map={"eos_token": {"content": "<gone>"}}),
    _beside("generation settings of another tokenizer", "generation_config.json names id 9999",
            generation_config={"eos_token_id": 9999}),
    _beside("a torn configuration", "tokenizer_config.json is not valid JSON",
            tokenizer_config="{"),
    _beside("a configuration that is a list", "special_tokens_map.json is no JSON object",
            special_tokens_map=[1]),
]  # fmt: skip


def _pairs(what: str, build: Callable[[Scene, Path], object], *names: str) -> Case:
    """``prepare --adopt`` of a directory that ``build`` fills with a copy of a good pair's ids."""

    def command(scene: Scene) -> list[str]:
        directory = scene.root / "pairs"
        directory.mkdir()
        build(scene, directory)
        scene.untouched.append(directory / "tokenizer.json")
        tokenizer = str(scene.prepared / "tokenizer.json")
        return ["prepare", "--adopt", "--output", str(directory), "--tokenizer", tokenizer]

    return Case("Pairs of other programs", what, command, names)


def _copy(scene: Scene, directory: Path) -> None:
    for suffix in ("bin", "idx"):
        shutil.copy(scene.prepared / f"even.{suffix}", directory)


def _without_ends(scene: Scene, directory: Path) -> None:
    with IndexedWriter(directory / "docs", np.uint16) as out:
        for ids in IndexedDataset(scene.prepared / "even"):
            out.add(ids[:-1])


def _cut_pair(scene: Scene, directory: Path) -> None:
    _copy(scene, directory)
    content = (directory / "even.bin").read_bytes()
    (directory / "even.bin").write_bytes(content[:-4])


def _larger_ids(scene: Scene, directory: Path) -> None:
    with IndexedWriter(directory / "docs", np.uint16) as out:
        out.add([1, 2, 60_000, 0])


def _half(scene: Scene, directory: Path) -> None:
    _copy(scene, directory)
    (directory / "other.bin").write_bytes(b"1234")


def _manifest(scene: Scene, directory: Path) -> None:
    _copy(scene, directory)
    (directory / "manifest.json").write_text("{}")


PAIRS = [
    _pairs("no pair", lambda scene, directory: None, "no .bin/.idx pair"),
    _pairs("documents that do not end", _without_ends, "do not end in the end-of-text id 0",
           "--add-eod", "--accept-no-eod"),
    _pairs("a pair cut", _cut_pair, "even.bin", "torn"),
    _pairs("ids of another tokenizer", _larger_ids, "60000", "another tokenizer"),
    _pairs("a .bin without its index", _half, "other.bin has no index"),
    _pairs("an index without its .bin",
           lambda scene, d: shutil.copy(scene.prepared / "even.idx", d), "even.bin does not exist"),
    _pairs("a directory that has a manifest", _manifest, "manifest.json already"),
    Case("Pairs of other programs", "a directory that is not there",
         lambda scene: ["prepare", "--adopt", "--output", str(scene.root / "none"), "--tokenizer",
                        str(scene.prepared / "tokenizer.json")], ("none does not exist",)),
]  # fmt: skip


def _add(
    what: str, addition: str, *names: str, content: bytes = GOOD, rest: tuple[str, ...] = ()
) -> Case:
    """``prepare --add-validation`` to a copy of the data; ``FILE`` stands for a file of texts."""

    def command(scene: Scene) -> list[str]:
        data = scene.data()
        file = scene.file("later.jsonl", content)
        scene.untouched.append(data / "validation" / "later.bin")
        more = addition.replace("FILE", str(file))
        return ["prepare", "--add-validation", more, "--output", str(data), "--workers", "1", *rest]

    return Case("Validation added later", what, command, names)


def _exchanged(path: Path) -> str:
    """The tokenizer with two ids exchanged: as large as before, and another."""
    description = json.loads(path.read_text())
    vocabulary = description["model"]["vocab"]
    a, b = list(vocabulary)[5:7]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    return json.dumps(description)


def _add_with_another(scene: Scene) -> list[str]:
    other = scene.file("other.json", _exchanged(scene.prepared / "tokenizer.json"))
    source = scene.file("later.jsonl", GOOD)
    command = ["prepare", "--add-validation", f"later={source}", "--output", str(scene.data())]
    return [*command, "--tokenizer", str(other)]


def _add_to_nothing(scene: Scene) -> list[str]:
    source = scene.file("later.jsonl", GOOD)
    output = scene.root / "unfinished"
    output.mkdir()
    return ["prepare", "--add-validation", f"later={source}", "--output", str(output)]


ADDED = [
    _add("no name for it", "FILE", "NAME=PATH"),
    _add("no path for it", "later=", "NAME=PATH"),
    _add("a name that is no file's", "a/b=FILE", "NAME=PATH"),
    _add("a path that is not there", "later=/nowhere/at/all", "does not exist"),
    _add("the name of a subset that was split off", "even=FILE", "even", "split off"),
    _add("nothing with text", "later=FILE", "no document with text", content=b'{"a": 1}\n'),
    _add("a skipped record, strictly", "later=FILE", "--strict", content=GOOD + b"nonsense\n",
         rest=("--strict",)),
    Case("Validation added later", "another tokenizer than the data's", _add_with_another,
         ("other.json", "tokenizer.json", "another tokenizer")),
    Case("Validation added later", "a directory that is not finished", _add_to_nothing,
         ("unfinished", "manifest.json")),
]  # fmt: skip


def _other_data(scene: Scene) -> Path:
    """Data made with another tokenizer of the same size."""
    data = scene.data()
    text = _exchanged(data / "tokenizer.json")
    digest = hashlib.sha256(text.encode()).hexdigest()
    (data / "tokenizer.json").write_text(text)
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["tokenizer"]["hash"] = digest
    (data / "manifest.json").write_text(json.dumps(manifest))
    return data


def _evaluate_other(scene: Scene) -> list[str]:
    scene.run()
    return scene.evaluate(scene.root / "run", _other_data(scene))


def _resume_other(scene: Scene) -> list[str]:
    scene.run()
    return scene.resume(data=_other_data(scene))


def _replaced(scene: Scene) -> Path:
    data = scene.data()
    (data / "tokenizer.json").write_text(_exchanged(data / "tokenizer.json"))
    return data


def _other_end(scene: Scene) -> list[str]:
    scene.run()
    data = scene.data()
    (data / "tokenizer_config.json").write_text('{"eos_token": "!"}')
    return scene.evaluate(scene.root / "run", data)


MEETING = [
    Case("A model and data", "evaluation on data of another tokenizer of the same size",
         _evaluate_other, ("data/tokenizer.json", "run/tokenizer.json", "another tokenizer")),
    Case("A model and data", "resuming on data of another tokenizer of the same size",
         _resume_other, ("data/tokenizer.json", "run/tokenizer.json", "another tokenizer")),
    Case("A model and data", "training on data whose tokenizer was replaced",
         lambda scene: scene.train(data=_replaced(scene)),
         ("tokenizer.json", "not the tokenizer that the data was made with")),
    Case("A model and data", "verifying data whose tokenizer was replaced",
         lambda scene: ["inspect-data", str(_replaced(scene)), "--samples", "0", "--verify"],
         ("not the tokenizer that the data was made with",)),
    Case("A model and data", "data whose end of text was changed", _other_end,
         ("tokenizer_config.json", "ends a text")),
]  # fmt: skip

TOKENS = [*TOKENIZERS, *PAIRS, *ADDED, *MEETING]
