"""prepare: what comes out, that it is the same however it was made, and that nothing is lost."""

import json
import logging
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data_corpus import (
    contents,
    lines_of,
    make_texts,
    small_tokenizer,
    texts_by_group,
    write,
    write_redpajama,
    write_tokenizer,
)
from ultramem_ds.data import merge, sources
from ultramem_ds.data import prepare as prepare_module
from ultramem_ds.data.duplicates import HashFile, find_duplicates
from ultramem_ds.data.manifest import load_manifest
from ultramem_ds.data.prepare import STAGING_DIRECTORY, PrepareConfig, prepare
from ultramem_ds.data.units import content_hash


@pytest.fixture
def tokenizer(tmp_path):
    return write_tokenizer(tmp_path / "tokenizer")


@pytest.fixture(scope="module")
def redpajama(tmp_path_factory):
    """A corpus in several units per file, and what `prepare` makes of it in one go."""
    root = tmp_path_factory.mktemp("redpajama")
    texts = write_redpajama(root / "data", documents=120)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_MIN_UNIT_BYTES", 4000)
        tokenizer = write_tokenizer(root / "tokenizer")
        config = PrepareConfig(validation_share=0.1)
        prepare([root / "data"], root / "out", tokenizer, config)
        yield root, texts


def split_texts(texts, share):
    """The split from its specification: the 64-bit hash of the text below the share."""
    splits = {"train": [], "validation": []}
    for text in texts:
        held_out = content_hash(text.encode()) < share * 2**64
        splits["validation" if held_out else "train"].append(text)
    return splits


def test_every_document_is_there_in_order(redpajama):
    root, texts = redpajama
    expected = {
        (split, subset): chosen
        for subset, all_texts in texts.items()
        for split, chosen in split_texts(all_texts, 0.1).items()
    }
    assert texts_by_group(root / "out") == expected
    manifest = load_manifest(root / "out")
    assert manifest.records == 6 * 120
    assert manifest.tokenizer.vocab_size == small_tokenizer().vocab_size
    for info in manifest.subsets:
        chosen = expected[info.group]
        ids, _ = small_tokenizer().encode_documents(chosen, np.int64)
        assert info.documents == len(chosen)
        assert info.tokens == len(ids)
        assert info.text_bytes == sum(len(text.encode()) for text in chosen)
    assert not (root / "out" / STAGING_DIRECTORY).exists()
    assert (root / "out/tokenizer.json").read_bytes() == small_tokenizer().content


def test_only_finished_files_have_final_names(redpajama):
    names = {Path(name).suffix for name in contents(redpajama[0] / "out")}
    assert names == {".bin", ".idx", ".json", ".jsonl"}


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_output_does_not_depend_on_workers(redpajama, tmp_path, workers):
    root, _ = redpajama
    config = PrepareConfig(validation_share=0.1, workers=workers)
    prepare([root / "data"], tmp_path / "out", root / "tokenizer", config)
    assert contents(tmp_path / "out") == contents(root / "out")


@pytest.mark.parametrize("shards", [[(0, 3), (1, 3), (2, 3)], [(3, 3), (1, 3), (2, 3)]])
def test_the_output_does_not_depend_on_shards(redpajama, tmp_path, shards):
    root, _ = redpajama
    manifests = [
        prepare(
            [root / "data"],
            tmp_path / "out",
            root / "tokenizer",
            PrepareConfig(validation_share=0.1, shard=shard),
        )
        for shard in shards
    ]
    assert manifests[:2] == [None, None] and manifests[2] is not None
    assert contents(tmp_path / "out") == contents(root / "out")


def test_interrupted_anywhere_and_repeated(redpajama, tmp_path, monkeypatch):
    """Fails at every durable step of a run in turn; each time the repeated run gets further."""
    root, _ = redpajama
    done = 0

    def failing(real):
        def call(*args, **kwargs):
            nonlocal done
            if done == 0:
                raise KeyboardInterrupt
            done -= 1
            return real(*args, **kwargs)

        return call

    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    config = PrepareConfig(validation_share=0.1)
    for budget in range(1, 200):
        done = budget % 7
        try:
            manifest = prepare([root / "data"], tmp_path / "out", root / "tokenizer", config)
        except KeyboardInterrupt:
            assert not (tmp_path / "out/manifest.json").exists()
            continue
        assert manifest is not None
        break
    monkeypatch.undo()
    assert budget > 5
    assert contents(tmp_path / "out") == contents(root / "out")


def test_repeating_a_finished_run_reads_nothing(redpajama, tmp_path, monkeypatch):
    root, _ = redpajama
    shutil.copytree(root / "out", tmp_path / "out")
    monkeypatch.setattr(prepare_module, "run_units", None)
    config = PrepareConfig(validation_share=0.1)
    assert prepare([root / "data"], tmp_path / "out", root / "tokenizer", config) is not None


def test_output_that_lost_a_file_is_made_again(redpajama, tmp_path):
    root, _ = redpajama
    for victim in ("c4.bin", "validation/c4.idx", "manifest.json"):
        shutil.copytree(root / "out", tmp_path / "out", dirs_exist_ok=True)
        (tmp_path / "out" / victim).unlink()
        config = PrepareConfig(validation_share=0.1)
        prepare([root / "data"], tmp_path / "out", root / "tokenizer", config)
        assert contents(tmp_path / "out") == contents(root / "out"), victim


def test_a_finished_directory_is_not_replaced_by_accident(redpajama, tmp_path):
    root, texts = redpajama
    shutil.copytree(root / "out", tmp_path / "out")
    with pytest.raises(ValueError, match="--overwrite"):
        prepare([root / "data/c4"], tmp_path / "out", root / "tokenizer")
    assert contents(tmp_path / "out") == contents(root / "out")
    prepare(
        [root / "data/c4"],
        tmp_path / "out",
        root / "tokenizer",
        PrepareConfig(overwrite=True, validation_share=0),
    )
    assert texts_by_group(tmp_path / "out") == {("train", "c4"): texts["c4"]}
    assert not list((tmp_path / "out").glob("arxiv*"))


def test_unfinished_work_survives_added_inputs(redpajama, tmp_path, monkeypatch):
    root, _ = redpajama
    first = PrepareConfig(validation_share=0.1, shard=(0, 2))
    prepare([root / "data/c4"], tmp_path / "out", root / "tokenizer", first)
    seen = []
    real = prepare_module.run_units

    def spy(jobs, *args, **kwargs):
        seen.extend(unit.key for unit, _ in jobs)
        return real(jobs, *args, **kwargs)

    monkeypatch.setattr(prepare_module, "run_units", spy)
    config = PrepareConfig(validation_share=0.1)
    prepare([root / "data"], tmp_path / "out", root / "tokenizer", config)
    units = sources.survey([str(root / "data")]).units
    assert 0 < len(seen) < len(units), "some units were done already"
    assert contents(tmp_path / "out") == contents(root / "out")


def test_bad_records_up_to_the_limit(tmp_path, tokenizer, caplog):
    good = lines_of({"text": text} for text in make_texts(0, 500))
    path = write(tmp_path / "x.jsonl", b"nonsense\n" * 20 + good)
    with caplog.at_level(logging.WARNING):
        manifest = prepare([path], tmp_path / "out", tokenizer)
    assert manifest is not None and manifest.bad_records == {"not JSON": 20}
    assert manifest.records == 520
    assert f"{path} at 9: not JSON" in caplog.text
    reports = (tmp_path / "out/bad_records.jsonl").read_text().splitlines()
    assert [json.loads(line)["offset"] for line in reports] == list(range(0, 180, 9))


def test_too_many_bad_records_stop_the_run(tmp_path, tokenizer):
    good = lines_of({"text": text} for text in make_texts(0, 500))
    path = write(tmp_path / "x.jsonl", b"nonsense\n" * 21 + good)
    with pytest.raises(ValueError, match=r"21 of the .* records read .*21 x not JSON"):
        prepare([path], tmp_path / "out", tokenizer)
    assert not list((tmp_path / "out").glob("*.bin"))
    allowed = PrepareConfig(max_bad_share=0.05)
    assert prepare([path], tmp_path / "out", tokenizer, allowed) is not None


def test_a_bad_file_among_many_records_is_within_the_share(tmp_path, tokenizer):
    write(tmp_path / "in/a.jsonl", b"nonsense\n" * 25)
    write(tmp_path / "in/b.jsonl", lines_of({"text": f"{k}"} for k in range(2600)))
    manifest = prepare([tmp_path / "in"], tmp_path / "out", tokenizer)
    assert manifest is not None and sum(manifest.bad_records.values()) == 25


def test_hopeless_input_stops_early(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(sources, "_MIN_UNIT_BYTES", 1000)
    path = write(tmp_path / "x.jsonl", b"nonsense\n" * 20_000)
    read = []
    real = prepare_module.run_units

    def spy(jobs, *args, **kwargs):
        for result in real(jobs, *args, **kwargs):
            read.append(result)
            yield result

    monkeypatch.setattr(prepare_module, "run_units", spy)
    with pytest.raises(ValueError, match="unusable"):
        prepare([path], tmp_path / "out", tokenizer)
    assert len(read) < 64 / 4


def test_empty_texts_are_documents(tmp_path, tokenizer):
    path = write(tmp_path / "x.jsonl", lines_of([{"text": ""}, {"text": "a"}, {"text": ""}]))
    config = PrepareConfig(validation_share=0)
    manifest = prepare([path], tmp_path / "out", tokenizer, config)
    assert texts_by_group(tmp_path / "out") == {("train", "x"): ["", "a", ""]}
    assert manifest is not None and manifest.duplicates["duplicates"] == 1


def test_input_without_documents(tmp_path, tokenizer):
    path = write(tmp_path / "x.jsonl", b"\n\n")
    with pytest.raises(ValueError, match="no document"):
        prepare([path], tmp_path / "out", tokenizer)


def overlapping(tmp_path):
    """C4 validation beside C4 training files that contain some of it, and repeats."""
    texts = make_texts(0, 300)
    write(tmp_path / "in/c4-train.00000-of-00002.json.gz", lines_of({"text": t} for t in texts))
    # 40 training documents again in another file; 10 of the held-out corpus in training.
    again = [*texts[:40], *make_texts(900, 10)]
    write(tmp_path / "in/c4-train.00001-of-00002.json.gz", lines_of({"text": t} for t in again))
    held_out = [*make_texts(900, 50), make_texts(900, 1)[0]]
    name = "c4-validation.00000-of-00008.json.gz"
    write(tmp_path / "in" / name, lines_of({"text": t} for t in held_out))
    return [tmp_path / "in"], texts, again, held_out


def test_duplicates_share_a_split_and_overlap_is_reported(tmp_path, tokenizer):
    inputs, texts, again, held_out = overlapping(tmp_path)
    config = PrepareConfig(validation_share=0.2)
    manifest = prepare(inputs, tmp_path / "out", tokenizer, config)
    found = texts_by_group(tmp_path / "out")
    assert found["validation", "c4_validation"] == held_out, "held out whole"
    assert ("train", "c4_validation") not in found
    train, validation = set(found["train", "in"]), set(found["validation", "in"])
    assert not train & validation
    assert sorted(found["train", "in"] + found["validation", "in"]) == sorted(texts + again)
    assert manifest is not None
    report = manifest.duplicates
    assert report["documents"] == 300 + 50 + 51
    assert report["duplicates"] == 40 + 10 + 1 and report["dropped"] == 0
    assert report["repeats"]["validation/c4_validation"] == 1
    assert report["repeats"]["train/in"] + report["repeats"]["validation/in"] == 40
    leaked = len(set(held_out) & train)
    assert report["texts_in_train_and_validation"] == leaked > 0


def test_duplicates_are_dropped_when_asked(tmp_path, tokenizer):
    inputs, texts, again, held_out = overlapping(tmp_path)
    config = PrepareConfig(validation_share=0.2, drop_duplicates=True)
    manifest = prepare(inputs, tmp_path / "out", tokenizer, config)
    found = texts_by_group(tmp_path / "out")
    assert found["validation", "c4_validation"] == held_out[:-1]
    everything = [text for group in found.values() for text in group]
    assert len(everything) == len(set(everything))
    assert set(everything) == {*texts, *again, *held_out}
    assert found["train", "in"] == split_texts(texts, 0.2)["train"], "the first of each is kept"
    assert manifest is not None and manifest.duplicates["dropped"] == 51
    for info in manifest.subsets:
        assert info.documents == len(found[info.group])
        assert info.text_bytes == sum(len(text.encode()) for text in found[info.group])


@given(
    groups=st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=20), min_size=1, max_size=4),
    bucket=st.sampled_from([1, 3, 1000]),
)
@settings(max_examples=100, deadline=None)
def test_duplicates_against_a_slow_count(tmp_path_factory, groups, bucket):
    directory = tmp_path_factory.mktemp("hashes")
    names = [("train", "a"), ("train", "b"), ("validation", "a"), ("validation", "b")]
    files = []
    for name, hashes in zip(names, groups):
        path = directory / "-".join(name)
        # Spread over all buckets.
        (np.array(hashes, np.uint64) * np.uint64(0x9E3779B97F4A7C15)).tofile(path)
        files.append(HashFile(name, path, len(hashes)))
    keep = np.zeros(sum(map(len, groups)), dtype=bool)
    found = find_duplicates(files, directory / "scratch", keep, bucket_documents=bucket)
    seen, expected = set(), []
    for value in (value for hashes in groups for value in hashes):
        expected.append(value not in seen)
        seen.add(value)
    assert keep.tolist() == expected
    assert found.duplicates == expected.count(False)
    assert found.repeats == {n: len(h) - len(set(h)) for n, h in zip(names, groups)}
    owners = {}
    for value in sorted(seen):
        key = tuple(sorted(n for n, h in zip(names, groups) if value in h))
        owners[key] = owners.get(key, 0) + 1
    assert found.shared == {key: count for key, count in owners.items() if len(key) > 1}
    assert not (directory / "scratch").exists()


def run_cli(*arguments, **options):
    command = [sys.executable, "-m", "ultramem_ds", "prepare", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_a_full_disk_is_a_clear_error_and_keeps_what_is_finished(redpajama, tmp_path):
    root, _ = redpajama
    arguments = ["--input", root / "data", "--output", tmp_path / "out"]
    arguments += ["--tokenizer", root / "tokenizer", "--workers", 1, "--validation-share", 0.1]

    def limit():
        # No file above this size: the merge's files are, the units' are not.
        resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))

    result = run_cli(*arguments, preexec_fn=limit)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: [Errno 27] File too large: ")
    assert str(tmp_path / "out") in result.stderr
    assert not [name for name in contents(tmp_path / "out") if name.endswith((".bin", ".idx"))]
    finished = list((tmp_path / "out").glob(f"{STAGING_DIRECTORY}/*/*/unit.json"))
    assert finished
    again = run_cli(*arguments)
    assert again.returncode == 0, again.stderr
    assert all(not path.exists() for path in finished)


def test_user_errors_are_one_line(redpajama, tmp_path):
    root, _ = redpajama
    (tmp_path / "file").write_text("in the way")
    base = ["--workers", 1, "--tokenizer", root / "tokenizer"]
    for arguments, message in [
        ([*base, "--input", tmp_path / "none", "--output", tmp_path / "o"], "does not exist"),
        ([*base, "--input", root / "data", "--output", tmp_path / "file"], str(tmp_path / "file")),
        ([*base[:3], tmp_path / "none", "--input", root, "--output", tmp_path / "o"], "does not"),
        ([*base, "--shard", "3/2", "--input", root, "--output", tmp_path / "o"], "shard 3/2"),
    ]:
        result = run_cli(*arguments)
        assert result.returncode == 2, result
        assert message in result.stderr.splitlines()[-1]
        assert "Traceback" not in result.stderr


def test_tokens_are_copied_in_blocks(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(merge, "_COPY_TOKENS", 7)
    texts = make_texts(0, 20)
    path = write(tmp_path / "x.jsonl", lines_of({"text": text} for text in texts))
    prepare([path], tmp_path / "out", tokenizer, PrepareConfig(validation_share=0))
    assert texts_by_group(tmp_path / "out") == {("train", "x"): texts}
