"""Advice about text, tokenizers and prepared data, followed."""

from __future__ import annotations

import gzip
import io
import json
import logging
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.unit.advice import MISTAKES, Advice, Follow, Told, ask, follow, says, with_words
from tests.unit.bad_input_texts import GOOD, prepare
from tests.unit.bad_inputs import FITS, Scene
from ultramem_ds.data.indexed import IndexedDataset, IndexedWriter
from ultramem_ds.data.manifest import load_manifest


def _again(told: Told) -> list[str]:
    return told.argv


def repeat_prepare(scene: Scene, output: Path, *rest: str) -> None:
    """The command that made the data of all scenes, with another output."""
    root = scene.prepared.parent
    said = ask([
        "prepare", "--input", str(root / "even"), "--input", str(root / "odd"), "--output",
        str(output), "--tokenizer", str(root / "tokenizer.json"), "--workers", "1",
        "--validation-share", "0.1", *rest,
    ])  # fmt: skip
    assert said.code == 0, said.text


def _data_of(told: Told) -> Path:
    option = "--data" if "--data" in told.argv else "inspect-data"
    return Path(told.argv[told.argv.index(option) + 1])


def _repeat(told: Told) -> list[str]:
    repeat_prepare(told.scene, _data_of(told))
    return told.argv


def _put_back(told: Told) -> list[str]:
    """The tokenizer's file that the message names, from the data that was copied."""
    file = Path(told.values[0])
    shutil.copy(told.scene.prepared / file.name, file)
    return told.argv


def _remove_if_none(told: Told) -> list[str]:
    file = Path(told.values[3])
    assert not (told.scene.prepared / file.name).exists()
    file.unlink()
    return told.argv


def _copy_tokenizer(told: Told) -> list[str]:
    shutil.copy(told.scene.prepared / "tokenizer.json", told.values[0])
    return told.argv


MISSING = says("data directory {} does not exist; make it with `prepare`")
UNFINISHED = says("{} has no {}: not prepared, or not to the end; run `prepare --input ... "
                  "--output` on it (again)")  # fmt: skip
TORN = says("{}.bin/.idx are missing or torn; repeat `prepare`")
NEITHER = says("{} holds neither {}; repeat `prepare`, or copy the tokenizer there")
REPLACED = says("{} is not the tokenizer that the data was made with (sha256 {}, {} says {}); put "
                "that one back, or repeat `prepare`")  # fmt: skip
OTHER_END = says("{} says that id {} ends a text, but the data was made with id {}; put the old {} "
                 "back, remove it if there was none, or repeat `prepare`")  # fmt: skip
ANOTHER = says("which the model was trained with: prepare the data with that one")

PREPARED = [
    Advice("data directory missing", MISSING, _repeat),
    Advice("data directory empty", UNFINISHED, _repeat),
    Advice("tokens truncated", TORN, _repeat),
    Advice("index missing", TORN, _repeat),
    Advice("tokenizer missing", NEITHER, _repeat),
    Advice("tokenizer missing", NEITHER, _copy_tokenizer),
    Advice("training on data whose tokenizer was replaced", REPLACED, _repeat),
    Advice("training on data whose tokenizer was replaced", REPLACED, _put_back),
    Advice("verifying data whose tokenizer was replaced", REPLACED, _repeat),
    Advice("data whose end of text was changed", OTHER_END, _repeat),
    Advice("data whose end of text was changed", OTHER_END, _remove_if_none),
    Advice("resuming on data of another tokenizer of the same size", ANOTHER,
           lambda told: _anew_with_the_runs_tokenizer(told)),
]  # fmt: skip


def _anew_with_the_runs_tokenizer(told: Told) -> list[str]:
    tokenizer = re.findall(r"than (\S+tokenizer\.json) ", told.line)[0]
    repeat_prepare(told.scene, told.scene.root / "anew", "--tokenizer", tokenizer)
    return told.option("--data", told.scene.root / "anew")


def _rewrite(told: Told, change: Callable[[Path], object]) -> list[str]:
    source = Path(told.argv[told.argv.index("--input") + 1])
    for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
        change(path)
    return told.argv


def rewriting(change: Callable[[Path], object]) -> Follow:
    """The command again, after every input file was changed as the message says."""
    return lambda told: _rewrite(told, change)


def _lines_of_arrays(path: Path) -> None:
    (records,) = json.loads(path.read_text()).values()
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _decompressed(path: Path) -> None:
    path.write_bytes(gzip.decompress(path.read_bytes()))


def _hub_snapshot(told: Told) -> list[str]:
    return told.option("--input", told.values[-1])


NO_TEXT = says("; see --text-key and --format", whole=True)
BAD_SHARE = says("more than {} of all and {}. Check the input, or raise --max-bad-share")
WINDOW = says("needs a zstd window of {} MiB of memory, more than --max-zstd-window-mib {}")
LONG = says("text file longer than {} bytes (--text-files line, or a larger --max-line-mib)")

TEXT_CASES = [
    Advice("no record with text", NO_TEXT, with_words("--text-key", "title")),
    Advice("a table without text", NO_TEXT, with_words("--text-key", "title")),
    Advice("prompts without answers", NO_TEXT, with_words("--format", "text", "--text-key",
                                                          "prompt")),
    Advice("no text to learn from",
           says("the inputs hold no document to train on ({}); see --text-key and --format"),
           with_words("--text-key", "body", "--vocab-size", "300")),
    Advice("too many lines of another encoding", BAD_SHARE, with_words("--encoding", "cp1252")),
    Advice(lambda scene: prepare(scene, scene.file("a.jsonl", b"nonsense\n" * 30 + GOOD)),
           BAD_SHARE, with_words("--max-bad-share", "0.2"), "too many bad lines"),
    Advice("a zstd window beyond the limit", WINDOW, with_words("--max-zstd-window-mib", "{0}")),
    Advice("a text file that is too long", LONG,
           lambda told: _rewrite(told, lambda p: p.write_text(f"{'x' * 999}\n" * 1100))
           and [*told.argv, "--text-files", "line"]),
    Advice("a text file that is too long", LONG, with_words("--max-line-mib", "2")),
    Advice("UTF-16 without a mark",
           says("UTF-16 without a byte-order mark? --encoding utf-16-{} reads it"),
           with_words("--encoding", "utf-16-le")),
    Advice("records under a key", says("no {}, but a list under {}: write one a line"),
           rewriting(_lines_of_arrays)),
    Advice("compressed twice", says("compressed twice; decompress it once"),
           rewriting(_decompressed)),
    Advice("a hub cache with two snapshots",
           says("and no refs/main says which one to read; give one as --input, for example {}"),
           _hub_snapshot),
    Advice("output into the input itself",
           says("input {} is {}; name something else, or a directory below it"),
           lambda told: [*told.argv, "--output", f"{told.scene.root}/elsewhere"]),
    Advice("output into the input itself", says("or a directory below it"),
           lambda told: [*told.argv, "--output", f"{told.scene.root}/in/below"]),
    Advice("prepared data as input", says("`train --data` takes it, if it is done"),
           lambda told: told.scene.train(*FITS, data=told.scene.root / "data")),
    Advice("an encoding that is none",
           says("unknown encoding {}; for example utf-8, utf-16, latin-1, cp1252, gb18030"),
           with_words("--encoding", "latin-1")),
]  # fmt: skip


def _zip(scene: Scene) -> list[str]:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("good.jsonl", GOOD)
    return prepare(scene, scene.file("in/a.jsonl", content.getvalue()).parent)


def _unzip(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        archive.extractall(path.parent)
    path.unlink()


def _tar(scene: Scene) -> list[str]:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        entry = tarfile.TarInfo("good.jsonl")
        entry.size = len(GOOD)
        archive.addfile(entry, io.BytesIO(GOOD))
    return prepare(scene, scene.file("in/a.jsonl.gz", content.getvalue()).parent)


def _untar(path: Path) -> None:
    with tarfile.open(path) as archive:
        archive.extractall(path.parent, filter="data")
    path.unlink()


def _arrow(scene: Scene) -> list[str]:
    import pyarrow as pa

    table = pa.table({"text": ["a b c"] * 30})
    path = scene.file("in/a.json", b"")
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return prepare(scene, path.parent)


def _arrow_to_parquet(path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.ipc.open_file(path).read_all()
    path.unlink()
    parquet.write_table(table, path.with_suffix(".parquet"))


def _orc(scene: Scene) -> list[str]:
    import pyarrow as pa
    from pyarrow import orc

    path = scene.file("in/a.json", b"")
    orc.write_table(pa.table({"text": ["a b c"] * 30}), path)
    return prepare(scene, path.parent)


def _orc_to_parquet(path: Path) -> None:
    from pyarrow import orc, parquet

    table = orc.read_table(path)
    path.unlink()
    parquet.write_table(table, path.with_suffix(".parquet"))


def _table_in_gzip(scene: Scene) -> list[str]:
    import pyarrow as pa
    from pyarrow import parquet

    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table({"text": ["a b c"] * 30}), sink)
    content = gzip.compress(sink.getvalue().to_pybytes())
    return prepare(scene, scene.file("in/a.parquet.gz", content).parent)


def _lz4(scene: Scene) -> list[str]:
    import pyarrow as pa

    content = pa.Codec("lz4").compress(GOOD, asbytes=True)
    return prepare(scene, scene.file("in/a.jsonl", content).parent)


def _from_lz4(path: Path) -> None:
    import pyarrow as pa

    content = pa.CompressedInputStream(pa.py_buffer(path.read_bytes()), "lz4").read()
    path.write_bytes(content)


def _gunzip(path: Path) -> None:
    path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    path.unlink()


def _index_alone(scene: Scene) -> list[str]:
    """A pair of another program where text is asked for."""
    scene.file("pairs/x", b"").unlink()
    for suffix in ("bin", "idx"):
        shutil.copy(scene.prepared / f"even.{suffix}", scene.root / "pairs")
    return prepare(scene, "pairs", tokenizer=scene.prepared / "tokenizer.json")


def _adopted(told: Told) -> list[str]:
    command = ["prepare", "--adopt", "--output", str(told.scene.root / "pairs")]
    return [*command, "--tokenizer", str(told.scene.prepared / "tokenizer.json")]


ARCHIVES = [
    Advice(_zip, says("a zip archive; unpack it"), rewriting(_unzip), "zip"),
    Advice(_tar, says("a tar archive; unpack it"), rewriting(_untar), "tar"),
    Advice(_lz4, says("compressed by lz4; decompress it"), rewriting(_from_lz4), "lz4"),
    Advice(_arrow, says("an Arrow file; write it as Parquet"), rewriting(_arrow_to_parquet),
           "Arrow"),
    Advice(_orc, says("an ORC file; write it as Parquet"), rewriting(_orc_to_parquet), "ORC"),
    Advice(_table_in_gzip, says("a compressed Parquet file; decompress it"), rewriting(_gunzip),
           "Parquet in gzip"),
    Advice(_index_alone, says("an index of tokenised data; see prepare --adopt"), _adopted,
           "an index"),
]  # fmt: skip


def _tokenizer_file(name: str, content: Callable[[bytes], bytes]) -> Callable[[Scene], list[str]]:
    """The good tokenizer, written otherwise."""

    def command(scene: Scene) -> list[str]:
        good = (scene.prepared / "tokenizer.json").read_bytes()
        file = scene.file(f"t/{name}", content(good))
        return prepare(scene, scene.file("a.jsonl", GOOD), tokenizer=file)

    return command


def _tokenizer_changed(change: Callable[[bytes], bytes]) -> Follow:
    def way(told: Told) -> list[str]:
        file = Path(told.argv[told.argv.index("--tokenizer") + 1])
        file.write_bytes(change(file.read_bytes()))
        return told.argv

    return way


def _merges(config: bool) -> Callable[[Scene], list[str]]:
    """vocab.json and merges.txt of a byte-level tokenizer, with or without the model's name."""

    def command(scene: Scene) -> list[str]:
        model = json.loads((scene.prepared / "tokenizer.json").read_text())["model"]
        scene.file("t/vocab.json", model["vocab"])
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        scene.file("t/merges.txt", "\n".join(["#version: 0.2", *merges]) + "\n")
        if config:
            scene.file("t/config.json", {"model_type": "gpt2"})
        return prepare(scene, scene.file("a.jsonl", GOOD), tokenizer=scene.root / "t")

    return command


def _with_transformers(told: Told) -> list[str]:
    import transformers

    kind = getattr(transformers, told.values[1])
    kind.from_pretrained(told.values[0]).save_pretrained(told.values[0])
    return told.argv


def _the_real_one(told: Told) -> list[str]:
    good = told.scene.prepared / "tokenizer.json"
    named = Path(told.argv[told.argv.index("--tokenizer") + 1]).parent / "tokenizer.json"
    shutil.copy(good, named)
    return told.option("--tokenizer", told.values[0] if told.values else named)


def _name_a_token(told: Told) -> list[str]:
    return [*told.argv, "--eod-token", "<mine>"]


def _with_byte_level(told: Told) -> list[str]:
    return told.option("--tokenizer", told.scene.prepared / "tokenizer.json")


MERGES = says("{} holds vocab.json and merges.txt but no tokenizer.json; transformers' "
              "{}.from_pretrained(DIR).save_pretrained(DIR) writes one")  # fmt: skip
TOKENIZERS = [
    Advice(_tokenizer_file("t.json", lambda good: good.decode().encode("utf-16")),
           says("UTF-16 by its byte-order mark; save it as UTF-8"),
           _tokenizer_changed(lambda c: c.decode("utf-16").encode()), "UTF-16"),
    Advice(_tokenizer_file("t.json", gzip.compress), says("compressed by gzip; decompress it"),
           _tokenizer_changed(gzip.decompress), "gzip"),
    Advice("a tiktoken vocabulary",
           says("a tiktoken vocabulary, which has no rules of its own to cut text; give the "
                "model's tokenizer.json"), _the_real_one),
    Advice("a bare vocabulary",
           says("a bare vocabulary; give a tokenizer.json, which has the rules too"),
           _the_real_one),
    Advice("Mistral's format", says("Mistral's tekken format; give the model's tokenizer.json"),
           _the_real_one),
    Advice("a configuration", says("a configuration; give the tokenizer itself, {}"),
           lambda told: shutil.copy(told.scene.prepared / "tokenizer.json", told.scene.root / "t")
           and told.option("--tokenizer", told.values[0])),
    Advice("no end-of-text token",
           says("it has no end-of-text token, none of {}; name one of its tokens with "
                "--eod-token"), _name_a_token),
    Advice(_merges(config=False), MERGES, _with_transformers, "merges alone"),
    Advice(_merges(config=True), MERGES, _with_transformers, "merges with a configuration"),
    Advice("no unknown token",
           says("it needs an unknown token, byte fallback or byte-level entries"),
           _with_byte_level),
]  # fmt: skip


def _adopt_again(*words: str) -> Follow:
    return lambda told: [*told.argv, *words]


def _other_end_of_pairs(told: Told) -> list[str]:
    """The token that the documents do end in."""
    pairs = Path(told.argv[told.argv.index("--output") + 1])
    tokens = json.loads((told.scene.prepared / "tokenizer.json").read_text())["model"]["vocab"]
    name, number = list(tokens.items())[300]
    with IndexedWriter(pairs / "docs", np.uint16) as out:
        for ids in IndexedDataset(told.scene.prepared / "even"):
            out.add([*ids[:-1], number])
    assert "do not end" in ask(told.argv).line
    return [*told.argv, "--eod-token", name]


def _add_index(told: Told) -> list[str]:
    pairs = Path(told.argv[told.argv.index("--output") + 1])
    shutil.copy(told.scene.prepared / "odd.bin", pairs / "other.bin")
    shutil.copy(told.scene.prepared / "odd.idx", pairs / f"{told.values[1]}.idx")
    return told.argv


def _move_half(told: Told) -> list[str]:
    Path(told.values[0]).rename(told.scene.root / "other.bin")
    return told.argv


UNENDED = says("do not end in the end-of-text id {} ({}): give another --eod-token, --add-eod to "
               "rewrite the pair with it, or --accept-no-eod to take them as they are")  # fmt: skip
HALF = says("{} has no index {}.idx; add it, or move the file")


def _renamed(told: Told) -> list[str]:
    """The name that the message gives as an example."""
    return [re.sub("^even=", f"{told.values[0]}_validation=", word) for word in told.argv]


def _added_twice(scene: Scene) -> list[str]:
    data = scene.data()
    for name in ("first", "second"):
        scene.file(f"{name}.jsonl", GOOD.replace(b"document", name.encode()))
    command = ["prepare", "--output", str(data), "--workers", "1", "--add-validation"]
    assert ask([*command, f"later={scene.root}/first.jsonl"]).code == 0
    return [*command, f"later={scene.root}/second.jsonl"]


def _prepared_otherwise(scene: Scene) -> list[str]:
    command = prepare(scene, scene.file("a.jsonl", GOOD))
    assert ask(command).code == 0
    return [*command, "--validation-share", "0.5"]


OTHER_PLAN = says("{} already holds a dataset made from other inputs, options or another "
                  "tokenizer; choose another --output, or --overwrite to replace it")  # fmt: skip
PAIRS = [
    Advice("documents that do not end", UNENDED, _adopt_again("--add-eod")),
    Advice("documents that do not end", UNENDED, _adopt_again("--accept-no-eod")),
    Advice("documents that do not end", UNENDED, _other_end_of_pairs),
    Advice("a .bin without its index", HALF, _add_index),
    Advice("a .bin without its index", HALF, _move_half),
    Advice("a directory that is not there",
           says("{} does not exist; --output names the directory of the pairs"),
           lambda told: _index_alone(told.scene)
           and told.option("--output", told.scene.root / "pairs")),
    Advice("no name for it", says("--add-validation {}: it takes NAME=PATH, as in c4=/data/c4"),
           lambda told: [word.replace(told.values[0], f"c4={told.values[0]}")
                         for word in told.argv]),
    Advice("the name of a subset that was split off",
           says("was split off the training data; give the added subset another name, for example "
                "{}_validation=..."), _renamed),
    Advice(_added_twice, says("{} was added from other files; --overwrite replaces it"),
           with_words("--overwrite"), "added twice"),
    Advice(_prepared_otherwise, OTHER_PLAN, with_words("--overwrite"), "prepared otherwise"),
    Advice(_prepared_otherwise, OTHER_PLAN,
           lambda told: told.option("--output", told.scene.root / "elsewhere"),
           "prepared otherwise"),
    Advice("ending documents that are not adopted", says("--{} is for --adopt"),
           lambda told: _index_alone(told.scene) and [*_adopted(told), "--add-eod"]),
]  # fmt: skip

CASES = [*PREPARED, *TEXT_CASES, *ARCHIVES, *TOKENIZERS, *PAIRS]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_following_helps(case: Advice, prepared: Path, trained: Path, tmp_path: Path) -> None:
    said = follow(case, Scene(tmp_path, prepared, trained))
    assert said.code == 0, said.text


OUTSIDE = says("subset {} has ids outside the tokenizer's {} entries; delete its .bin and repeat "
               "`prepare`")  # fmt: skip


def test_ids_outside_the_tokenizer(prepared: Path, tmp_path: Path) -> None:
    """Of a .bin that is as long as it was: repeating the command alone would leave it."""
    from ultramem_ds.data.mixture import Mixture

    scene = Scene(tmp_path, prepared, prepared)
    data = scene.data()
    size = (data / "odd.bin").stat().st_size
    (data / "odd.bin").write_bytes(b"\xff" * size)

    def read() -> None:
        mixture = Mixture(data, "train", seq_len=32, weights={"odd": 1.0}, seed=0)
        mixture.sample(0)

    with pytest.raises(ValueError) as refusal:
        read()
    subset, _ = OUTSIDE.values(refusal.value)
    (data / f"{subset}.bin").unlink()
    repeat_prepare(scene, data)
    read()


OTHER_EOD = says("{} ends texts in id {}, {} in {}: prepare the data with --eod-token {}")


def test_data_that_end_otherwise(trained: Path, prepared: Path, tmp_path: Path) -> None:
    scene = Scene(tmp_path, prepared, trained)
    repeat_prepare(scene, tmp_path / "other", "--eod-token", "!")
    token = OTHER_EOD.values(ask(scene.evaluate(trained, tmp_path / "other")).line)[-1]
    repeat_prepare(scene, tmp_path / "other", "--eod-token", token, "--overwrite")
    said = ask(scene.evaluate(trained, tmp_path / "other"))
    assert said.code == 0, said.text


CHANGED_ENDS = says("do not end in the end-of-text id {}, the manifest knows of {}; adopt the pair "
                    "anew (`prepare --adopt` with --add-eod or --accept-no-eod, without the "
                    "manifest)")  # fmt: skip


@pytest.mark.parametrize("option", ["--add-eod", "--accept-no-eod"])
def test_an_adopted_pair_that_changed(option: str, prepared: Path, tmp_path: Path) -> None:
    scene = Scene(tmp_path, prepared, prepared)
    command = MISTAKES["documents that do not end"](scene)
    pairs = scene.root / "pairs"
    assert ask([*command, "--accept-no-eod"]).code == 0
    path = pairs / "manifest.json"
    manifest = json.loads(path.read_text())
    for subset in manifest["subsets"]:
        subset["unended"] = 0  # as if the pair had been exchanged after it was adopted
    path.write_text(json.dumps(manifest))
    verify = ["inspect-data", str(pairs), "--samples", "0", "--verify"]
    CHANGED_ENDS.values(ask(verify).line)
    path.unlink()
    assert ask([*command, option]).code == 0
    said = ask(verify)
    assert said.code == 0, said.text


LEAKS = says("texts are in training and in a held-out corpus; --drop-duplicates removes them from "
             "training")  # fmt: skip


def test_texts_held_out_and_trained_on(prepared: Path, tmp_path: Path) -> None:
    scene = Scene(tmp_path, prepared, prepared)
    source = scene.file("in/a.jsonl", GOOD)
    scene.file("in/wikitext/b.jsonl", GOOD)
    data = scene.root / "new-data"
    command = prepare(scene, source.parent, "--held-out", "wikitext")
    assert ask(command).code == 0
    LEAKS.values(ask(["inspect-data", str(data), "--samples", "0"]).text)
    assert ask([*command, "--drop-duplicates", "--overwrite"]).code == 0
    said = ask(["inspect-data", str(data), "--samples", "0"])
    assert said.code == 0 and "warning" not in said.text, said.text


RIVALS = says("several tokens of the tokenizer could end a document: {} is taken, not {}; "
              "--eod-token chooses")  # fmt: skip


def test_several_ends_of_text(
    prepared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scene = Scene(tmp_path, prepared, prepared)
    tokenizer = json.loads((prepared / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    last = max(vocabulary, key=lambda token: vocabulary[token])
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    vocabulary["</s>"] = vocabulary.pop(last)
    file = scene.file("two.json", tokenizer)
    command = prepare(scene, scene.file("a.jsonl", GOOD), tokenizer=file)
    with caplog.at_level(logging.WARNING):
        assert ask(command).code == 0
    taken, rival = RIVALS.values(caplog.text)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert ask([*command, "--eod-token", rival, "--overwrite"]).code == 0
    assert not caplog.text and taken != rival
    end = load_manifest(scene.root / "new-data").tokenizer.eos_id
    assert end == vocabulary[rival]
