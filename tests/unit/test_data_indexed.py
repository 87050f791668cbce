"""Megatron-LM's .bin/.idx: against an independent implementation of the layout."""

import pickle
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data_corpus import (
    contents,
    make_texts,
    read_megatron,
    small_tokenizer,
    write_megatron,
    write_tokenizer,
)
from ultramem_ds.data.adopt import adopt
from ultramem_ds.data.indexed import IndexedDataset, IndexedWriter, id_dtype
from ultramem_ds.data.mixture import Mixture
from ultramem_ds.data.validation import ValidationSet

DOCUMENTS = st.lists(st.lists(st.integers(0, 65_499), max_size=20), min_size=1, max_size=20)


@given(documents=DOCUMENTS, dtype=st.sampled_from([np.uint16, np.int32]))
@settings(max_examples=50, deadline=None)
def test_written_files_are_read_by_an_independent_reader(documents, dtype):
    with TemporaryDirectory() as name:
        prefix = Path(name) / "a.b"
        with IndexedWriter(prefix, dtype) as writer:
            for ids in documents:
                writer.add(ids)
        read = read_megatron(prefix)
        assert [ids.tolist() for ids in read] == documents
        assert all(ids.dtype == dtype for ids in read)


@given(
    documents=DOCUMENTS,
    layout=st.sampled_from([(4, "<i4"), (8, "<u2"), (5, "<i8"), (6, "<u2")]),
)
@settings(max_examples=50, deadline=None)
def test_files_in_that_layout_are_read_here(documents, layout):
    code, dtype = layout
    with TemporaryDirectory() as name:
        prefix = Path(name) / "x"
        write_megatron(prefix, documents, code=code, dtype=dtype)
        dataset = IndexedDataset(prefix)
        assert [ids.tolist() for ids in dataset] == documents
        assert dataset.num_tokens == sum(map(len, documents))
        flat = [token for ids in documents for token in ids]
        assert dataset.tokens(0, len(flat)).tolist() == flat
        dataset.check_layout()
        dataset.check_ids(65_500)


@given(documents=DOCUMENTS, bounds=st.tuples(st.integers(0, 200), st.integers(0, 200)))
@settings(max_examples=100, deadline=None)
def test_document_starts(documents, bounds):
    with TemporaryDirectory() as name:
        prefix = Path(name) / "x"
        write_megatron(prefix, documents, code=8, dtype="<u2")
        begin, end = sorted(bounds)
        starts = np.cumsum([0, *map(len, documents)])[:-1]
        expected = [start for start in starts.tolist() if begin <= start < end]
        assert IndexedDataset(prefix).document_starts(begin, end).tolist() == expected


def test_files_written_by_deepspeed(tmp_path):
    builders = pytest.importorskip("deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset")
    documents = [[1, 2, 65_000], [7], [9, 9]]
    for dtype in (np.uint16, np.uint64, np.int32):
        prefix = tmp_path / np.dtype(dtype).name
        builder = builders.MMapIndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        for ids in documents:
            builder.add_item_numpy(np.array(ids))
            builder.end_document()
        builder.finalize(f"{prefix}.idx")
        assert [ids.tolist() for ids in IndexedDataset(prefix)] == documents


def test_several_sequences_per_document(tmp_path):
    # Megatron-LM can store sentences as sequences: the document index is what counts.
    write_megatron(tmp_path / "x", [[1, 2], [3], [4, 5, 6]], code=8, dtype="<u2")
    index = (tmp_path / "x.idx").read_bytes()
    entries = np.array([0, 2, 3], dtype="<i8")
    head = index[:26] + np.uint64(3).tobytes() + index[34 : 34 + 12 * 3]
    (tmp_path / "x.idx").write_bytes(head + entries.tobytes())
    dataset = IndexedDataset(tmp_path / "x")
    assert dataset.document_starts(0, 6).tolist() == [0, 3]
    dataset.check_layout()


def test_pickles_by_path(tmp_path):
    write_megatron(tmp_path / "x", [list(range(1000))], code=8, dtype="<u2")
    dataset = IndexedDataset(tmp_path / "x")
    data = pickle.dumps(dataset)
    assert len(data) < 500
    assert pickle.loads(data)[0].tolist() == list(range(1000))


def test_empty_pair(tmp_path):
    with IndexedWriter(tmp_path / "x", np.uint16):
        pass
    dataset = IndexedDataset(tmp_path / "x")
    assert len(dataset) == 0 and dataset.num_tokens == 0
    assert dataset.document_starts(0, 10).tolist() == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda prefix: Path(f"{prefix}.bin").unlink(), r"x\.bin does not exist"),
        (lambda prefix: _cut(f"{prefix}.bin", 2), "does not fit its index"),
        (lambda prefix: _cut(f"{prefix}.idx", 1), "is torn"),
        (lambda prefix: _cut(f"{prefix}.idx", 70), "not an indexed dataset"),
        (lambda prefix: _poke(f"{prefix}.idx", 0, b"X"), "magic"),
        (lambda prefix: _poke(f"{prefix}.idx", 9, b"\x02"), "version 2"),
        (lambda prefix: _poke(f"{prefix}.idx", 17, b"\x07"), "dtype code 7"),
        (lambda prefix: _poke(f"{prefix}.idx", 17, b"\x04"), "does not fit"),
    ],
)
def test_damaged_pairs_are_refused(tmp_path, damage, message):
    prefix = tmp_path / "x"
    write_megatron(prefix, [[1, 2, 3], [4]], code=8, dtype="<u2")
    damage(prefix)
    with pytest.raises(ValueError, match=message):
        IndexedDataset(prefix)


def _cut(path: str, count: int) -> None:
    Path(path).write_bytes(Path(path).read_bytes()[:-count])


def _poke(path: str, at: int, value: bytes) -> None:
    content = bytearray(Path(path).read_bytes())
    content[at : at + len(value)] = value
    Path(path).write_bytes(bytes(content))


def test_ids_and_layout_are_checked(tmp_path):
    write_megatron(tmp_path / "x", [[1, 2, 399], [4, 400], [5], [6]], code=8, dtype="<u2")
    dataset = IndexedDataset(tmp_path / "x")
    dataset.check_ids(401)
    with pytest.raises(ValueError, match="token id 400"):
        dataset.check_ids(400)
    _poke(str(tmp_path / "x.idx"), 34, b"\x02")  # first document shorter: a gap
    with pytest.raises(ValueError, match="leave gaps"):
        IndexedDataset(tmp_path / "x").check_layout()


def test_writer_refuses_ids_that_do_not_fit_and_leaves_nothing(tmp_path):
    with (
        pytest.raises(ValueError, match="does not fit"),
        IndexedWriter(tmp_path / "x", np.uint16) as writer,
    ):
        writer.add([1, 65_536])
    assert list(tmp_path.iterdir()) == []
    assert id_dtype(50_277) == np.uint16 and id_dtype(70_000) == np.int32


def test_pairs_of_other_programs_are_adopted(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "t")
    texts = make_texts(0, 30)
    ids, lengths = small_tokenizer().encode_documents(texts, np.int64)
    documents = np.split(ids, np.cumsum(lengths)[:-1])
    (tmp_path / "data/validation").mkdir(parents=True)
    write_megatron(tmp_path / "data/mine_text_document", documents, code=4, dtype="<i4")
    write_megatron(tmp_path / "data/validation/other", documents, code=5, dtype="<i8")
    before = contents(tmp_path / "data")
    adopt(tmp_path / "data", tokenizer)
    after = contents(tmp_path / "data")
    assert {name: after[name] for name in before} == before
    mixture = Mixture(tmp_path / "data", "train", seq_len=16, weights={}, seed=0)
    assert mixture.subsets == ("mine_text_document",)
    sequence = mixture.locate(0).sequence
    assert mixture.sample(0).tolist() == ids[sequence * 16 : sequence * 16 + 17].tolist()
    held_out = ValidationSet(tmp_path / "data", "other", 16)
    assert held_out[0].tolist() == ids[:17].tolist()
    assert held_out.info.text_bytes == sum(len(text.encode()) for text in texts)
    with pytest.raises(ValueError, match="already"):
        adopt(tmp_path / "data", tokenizer)


def test_adopting_checks_the_ids(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "t")
    with pytest.raises(ValueError, match="no .bin/.idx"):
        adopt(tmp_path / "t", tokenizer)
    write_megatron(tmp_path / "x", [[1, 60_000]], code=8, dtype="<u2")
    with pytest.raises(ValueError, match="token id 60000"):
        adopt(tmp_path, tokenizer)
