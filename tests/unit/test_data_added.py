"""Held-out subsets that come later, and pairs of others without end-of-text ids."""

import json

import numpy as np
import pytest

from tests.unit.data_corpus import contents, lines_of, make_texts, small_tokenizer
from ultramem_ds.data.added import add_validation
from ultramem_ds.data.adopt import adopt
from ultramem_ds.data.indexed import IndexedDataset, IndexedWriter
from ultramem_ds.data.inspect import describe, verify
from ultramem_ds.data.manifest import load_manifest
from ultramem_ds.data.mixture import Mixture
from ultramem_ds.data.prepare import PrepareConfig, prepare
from ultramem_ds.data.validation import ValidationSet


@pytest.fixture
def finished(tmp_path):
    """Two subsets, validation split off; texts 0 to 99 in each."""
    small_tokenizer().save(tmp_path)
    for name, first in (("c4", 0), ("arxiv", 1000)):
        path = tmp_path / f"in/{name}/x.jsonl"
        path.parent.mkdir(parents=True)
        path.write_bytes(lines_of({"text": text} for text in make_texts(first, 100)))
    prepare([tmp_path / "in"], tmp_path / "out", tmp_path, PrepareConfig(validation_share=0.1))
    return tmp_path / "out"


def held_out(tmp_path, texts, name="c4-validation.00000-of-00008.json"):
    path = tmp_path / name
    path.write_bytes(lines_of({"text": text} for text in texts))
    return path


def test_validation_joins_a_finished_directory(finished, tmp_path):
    before = contents(finished)
    order = Mixture(finished, "train", seq_len=16, weights={}, seed=0).fingerprint
    texts = make_texts(500, 30) + make_texts(0, 7) + make_texts(500, 2)
    path = held_out(tmp_path, texts)
    manifest = add_validation(finished, f"c4_validation={path}")
    after = contents(finished)
    changed = {name for name in after if before.get(name) != after[name]}
    assert changed == {
        "manifest.json",
        "validation/c4_validation.bin",
        "validation/c4_validation.idx",
        "validation/c4_validation.json",
    }
    assert Mixture(finished, "train", seq_len=16, weights={}, seed=0).fingerprint == order
    info = manifest.of_split("validation")["c4_validation"]
    assert info.documents == 39 and info.text_bytes == sum(len(t.encode()) for t in texts)
    verify(finished)
    sequences = ValidationSet(finished, "c4_validation", 16)
    assert (
        sequences[0].tolist()
        == small_tokenizer().encode_documents(texts, np.int64)[0][:17].tolist()
    )


def test_the_overlap_is_reported(finished, tmp_path):
    texts = make_texts(500, 30) + make_texts(0, 9) + make_texts(1000, 1) + make_texts(0, 3)
    manifest = add_validation(finished, f"later={held_out(tmp_path, texts)}")
    shared = {tuple(s["groups"]): s["texts"] for s in manifest.added["later"]["shared"]}
    # By the documents themselves: the texts of each pair, decoded.
    expected = {}
    for other in manifest.subsets:
        if other.subset != "later":
            place = finished / ("validation" if other.split == "validation" else "")
            decoded = {
                small_tokenizer().decode(ids.tolist())
                for ids in IndexedDataset(place / other.subset)
            }
            if count := len(decoded & set(texts)):
                expected["validation/later", f"{other.split}/{other.subset}"] = count
    assert shared == expected and sum(expected.values()) == 10
    lines = "\n".join(describe(finished))
    train = expected["validation/later", "train/c4"]
    assert f"warning: {train} texts occur in validation/later and train/c4" in lines


def test_adding_again_and_names_that_are_taken(finished, tmp_path):
    path = held_out(tmp_path, make_texts(500, 30))
    add_validation(finished, f"later={path}")
    before = contents(finished)
    add_validation(finished, f"later={path}")
    assert contents(finished) == before, "repeating changes nothing"
    prepare([tmp_path / "in"], finished, tmp_path, PrepareConfig(validation_share=0.1))
    assert contents(finished) == before, "and neither does the first command"
    other = held_out(tmp_path, make_texts(600, 5), "other.jsonl")
    with pytest.raises(ValueError, match="was added from other files; --overwrite"):
        add_validation(finished, f"later={other}")
    add_validation(finished, f"later={other}", PrepareConfig(overwrite=True))
    assert load_manifest(finished).of_split("validation")["later"].documents == 5
    with pytest.raises(ValueError, match="was split off the training data.*c4_validation="):
        add_validation(finished, f"c4={path}")
    for text in ("c4", "c4=", "=x", "a/b=x"):
        with pytest.raises(ValueError, match="takes NAME=PATH"):
            add_validation(finished, text)


def test_an_addition_that_fails_leaves_the_directory_as_it_was(finished, tmp_path):
    before = contents(finished)
    good, bad = held_out(tmp_path, make_texts(500, 3)), held_out(tmp_path, [], "empty.jsonl")
    with pytest.raises(ValueError, match="0 bytes"):
        add_validation(finished, f"later={bad}")
    bad.write_text('{"no": "text"}\n')
    with pytest.raises(ValueError, match="no document"):
        add_validation(finished, f"later={bad}")
    description = json.loads(small_tokenizer().content)
    vocabulary = description["model"]["vocab"]
    a, b = list(vocabulary)[5:7]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (tmp_path / "other.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="another tokenizer"):
        add_validation(finished, f"later={good}", tokenizer_path=str(tmp_path / "other.json"))
    now = {name: value for name, value in contents(finished).items() if ".staging" not in name}
    assert now == before
    add_validation(finished, f"later={good}", tokenizer_path=str(tmp_path / "tokenizer.json"))


def pairs_without_ends(directory, documents=30):
    """As Megatron-LM's tool writes them without its option for an end-of-document id."""
    directory.mkdir(parents=True)
    ids = [small_tokenizer().encode(text) for text in make_texts(0, documents)]
    with IndexedWriter(directory / "docs_text_document", np.uint16) as out:
        for number, document in enumerate(ids):
            out.add([*document, small_tokenizer().eos_id] if number % 3 == 0 else document)
    return ids


def test_documents_without_an_end_are_found(tmp_path):
    pairs_without_ends(tmp_path / "data")
    small_tokenizer().save(tmp_path)
    before = contents(tmp_path / "data")
    with pytest.raises(ValueError, match="20 of the 30 documents.*--add-eod.*--accept-no-eod"):
        adopt(tmp_path / "data", tmp_path)
    assert contents(tmp_path / "data") == before


def test_ends_are_added_when_asked(tmp_path):
    ids = pairs_without_ends(tmp_path / "data")
    small_tokenizer().save(tmp_path)
    adopt(tmp_path / "data", tmp_path, missing_eod="add")
    found = [document.tolist() for document in IndexedDataset(tmp_path / "data/docs_text_document")]
    assert found == [[*document, small_tokenizer().eos_id] for document in ids]
    verify(tmp_path / "data")
    assert {name.split(".")[-1] for name in contents(tmp_path / "data")} == {"bin", "idx", "json"}


def test_documents_without_an_end_are_accepted_when_asked(tmp_path):
    pairs_without_ends(tmp_path / "data")
    small_tokenizer().save(tmp_path)
    manifest = adopt(tmp_path / "data", tmp_path, missing_eod="accept")
    assert manifest.subsets[0].unended == 20
    verify(tmp_path / "data")
    assert any("20 adopted documents do not end" in line for line in describe(tmp_path / "data"))


def test_verify_finds_documents_without_an_end(tmp_path):
    """In a directory that an earlier version adopted without a word."""
    pairs_without_ends(tmp_path / "data")
    small_tokenizer().save(tmp_path)
    adopt(tmp_path / "data", tmp_path, missing_eod="accept")
    manifest = json.loads((tmp_path / "data/manifest.json").read_text())
    del manifest["subsets"][0]["unended"]
    (tmp_path / "data/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="20 documents do not end in the end-of-text id 0"):
        verify(tmp_path / "data")


def test_half_a_pair_is_not_left_out(tmp_path):
    pairs_without_ends(tmp_path / "data")
    small_tokenizer().save(tmp_path)
    (tmp_path / "data/other.bin").write_bytes(b"1234")
    with pytest.raises(ValueError, match="other.bin has no index"):
        adopt(tmp_path / "data", tmp_path, missing_eod="accept")
