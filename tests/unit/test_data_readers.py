"""Readers: every layout of RedPajama and its kin, byte ranges, bad records, broken files."""

import dataclasses
import json
import tracemalloc
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data_corpus import lines_of, make_texts, write, write_redpajama
from ultramem_ds.data import sources
from ultramem_ds.data.options import ReadOptions
from ultramem_ds.data.readers import BadRecord, Document, read_unit
from ultramem_ds.data.sources import survey


def find_units(inputs, **options):
    return survey(inputs, ReadOptions(**options)).units


def read(*inputs, **options):
    """(documents by subset, bad records) of all inputs."""
    texts: dict[str, list[str]] = {}
    bad = []
    for unit in find_units([str(path) for path in inputs], **options):
        for record in read_unit(unit, ReadOptions(**options)):
            if isinstance(record, Document):
                assert record.data == record.text.encode()
                texts.setdefault(record.subset, []).append(record.text)
            elif isinstance(record, BadRecord):
                bad.append(record)
    return texts, bad


def test_redpajama_1t(tmp_path):
    texts = write_redpajama(tmp_path / "data")
    assert read(tmp_path / "data") == (texts, [])
    # The same, given as its directories.
    assert read(*sorted((tmp_path / "data").iterdir())) == (texts, [])


def test_redpajama_1t_sample(tmp_path):
    names = {
        "arxiv_sample.jsonl": "arxiv",
        "book_sample.jsonl": "book",
        "c4_sample.jsonl": "c4",
        "cc_2019-30_sample.jsonl": "common_crawl",
        "cc_2023-06_sample.jsonl": "common_crawl",
        "github_sample.jsonl": "github",
        "stackexchange_sample.jsonl": "stackexchange",
        "wikipedia_sample.jsonl": "wikipedia",
    }
    for name in names:
        write(tmp_path / "sample" / name, lines_of([{"text": name, "meta": {}}]))
    texts, _ = read(tmp_path / "sample")
    assert texts == {
        subset: [name for name, other in names.items() if other == subset]
        for subset in names.values()
    }


def test_subset_of_the_hub_rows_of_the_sample(tmp_path):
    rows = [{"text": "a", "meta": "{}", "red_pajama_subset": "common_crawl"}]
    assert read(write(tmp_path / "x.jsonl", lines_of(rows)))[0] == {"common_crawl": ["a"]}


def test_slimpajama(tmp_path):
    names = {
        "RedPajamaCommonCrawl": "common_crawl",
        "RedPajamaC4": "c4",
        "RedPajamaGithub": "github",
        "RedPajamaBook": "book",
        "RedPajamaArXiv": "arxiv",
        "RedPajamaWikipedia": "wikipedia",
        "RedPajamaStackExchange": "stackexchange",
    }
    rows = [{"text": name, "meta": {"redpajama_set_name": name}} for name in names]
    write(tmp_path / "SlimPajama-627B/train/chunk1/example_train_0.jsonl.zst", lines_of(rows))
    texts, bad = read(tmp_path / "SlimPajama-627B")
    assert texts == {subset: [name] for name, subset in names.items()} and not bad


def test_redpajama_v2(tmp_path):
    rows = [{"url": "u", "raw_content": text, "digest": "d"} for text in make_texts(0, 5)]
    write(tmp_path / "v2/documents/2023-06/0000/en_head.json.gz", lines_of(rows))
    assert read(tmp_path / "v2") == ({"common_crawl": make_texts(0, 5)}, [])


def test_c4_validation(tmp_path):
    rows = [{"text": "t", "timestamp": "2019", "url": "u"}]
    write(tmp_path / "c4/en/c4-validation.00000-of-00008.json.gz", lines_of(rows))
    write(tmp_path / "c4/en/c4-train.00000-of-01024.json.gz", lines_of(rows))
    assert set(read(tmp_path / "c4")[0]) == {"c4_validation", "c4"}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "jsonl.gz", "json.gz", "jsonl.zst"])
def test_plain_and_compressed_files_give_the_same(tmp_path, suffix):
    texts = make_texts(0, 100)
    path = write(tmp_path / "mine" / f"x.{suffix}", lines_of({"text": text} for text in texts))
    assert read(path)[0] == {"x": texts}
    assert read(path.parent)[0] == {"mine": texts}
    assert read(f"other={path}")[0] == {"other": texts}
    assert read(path.parent.parent)[0] == {"mine": texts}


def test_parquet_is_read_by_row_groups(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    texts = make_texts(0, 100)
    table = pa.table({"text": [*texts[:99], None], "other": list(range(100))})
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=30)
    assert len(find_units([str(tmp_path)])) == 4
    documents, bad = read(tmp_path / "x.parquet")
    assert documents == {"x": texts[:99]}
    assert [record.reason for record in bad] == ["text is not a string"]
    table = pa.table({"red_pajama_subset": ["c4", "arxiv"], "text": ["a", "b"]})
    parquet.write_table(table, tmp_path / "y.parquet")
    assert read(tmp_path / "y.parquet")[0] == {"c4": ["a"], "arxiv": ["b"]}


def test_hugging_face_datasets(tmp_path):
    # A dataset directory stands for a hub id: `datasets` opens both alike.
    for number in range(3):
        rows = ({"text": text} for text in make_texts(10 * number, 10))
        write(tmp_path / "mine/data" / f"train-{number}.jsonl", lines_of(rows))
    texts, bad = read(f"hf:{tmp_path / 'mine'}")
    assert texts == {"mine": make_texts(0, 30)} and not bad
    assert set(read(f"c4=hf:{tmp_path / 'mine'}::train")[0]) == {"c4"}
    with pytest.raises(ValueError, match="datasets cannot read"):
        find_units([f"hf:{tmp_path / 'none'}"])


LINES = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=30)


@given(texts=LINES, step=st.integers(1, 60), crlf=st.booleans(), last=st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_byte_ranges_give_every_line_once(texts, step, crlf, last):
    newline = b"\r\n" if crlf else b"\n"
    content = newline.join(
        json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts
    )
    content += newline if last and texts else b""
    with TemporaryDirectory() as name:
        path = write(Path(name) / "x.jsonl", content)
        whole = find_units([str(path)]) if content else ()  # an empty file is skipped, and said
        ranges = [
            dataclasses.replace(unit, begin=begin, end=min(begin + step, len(content)))
            for unit in whole
            for begin in range(0, len(content), step)
        ]
        found = [record.text for unit in ranges for record in read_unit(unit)]
    assert found == texts


def test_large_files_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_MIN_UNIT_BYTES", 1000)
    texts = make_texts(0, 200)
    path = write(tmp_path / "wiki.jsonl", lines_of({"text": text} for text in texts))
    units = find_units([str(path)])
    assert len(units) == -(-path.stat().st_size // max(1000, path.stat().st_size // 64))
    assert sum(unit.num_bytes for unit in units) == path.stat().st_size
    assert read(path)[0] == {"wiki": texts}


BAD_LINES = {
    b"not json": "not JSON",
    b"{": "not JSON",
    b'["text"]': "not a JSON object",
    b'{"body": "x"}': "no text / raw_content / content",
    b'{"text": null}': "text is not a string",
    b'{"text": ["a"]}': "text is not a string",
    b'{"text": "\xff"}': "invalid UTF-8",
    b'{"text": "\\ud800"}': "text is not valid Unicode",
    b"[" * 100_000: "not JSON",
    b'{"text": "' + b"x" * 200_000 + b'"}': "line longer than 150000 bytes",
}


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_bad_lines_are_reported_with_their_offset(tmp_path, suffix):
    good = b'{"text": "ok"}'
    lines = [line for bad in BAD_LINES for line in (bad, good, b"", b"  \r")]
    path = write(tmp_path / f"x.{suffix}", b"\n".join(lines))
    texts, bad = read(path, max_line_bytes=150_000)
    assert texts == {"x": ["ok"] * len(BAD_LINES)}, "empty lines are no records"
    offsets = {}
    at = 0
    for line in lines:
        offsets[line] = at
        at += len(line) + 1
    assert bad == [BadRecord(offsets[line], reason) for line, reason in BAD_LINES.items()]


def test_another_text_key(tmp_path):
    path = write(tmp_path / "x.jsonl", lines_of([{"body": "b", "text": "t"}]))
    assert read(path, text_key="body")[0] == {"x": ["b"]}


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.zst", "jsonl.gz"])
def test_a_200_mb_line_is_skipped_in_flat_memory(tmp_path, suffix):
    size = 200_000_000
    content = b'{"text": "' + b"x" * size + b'"}\n{"text": "after"}\n'
    path = write(tmp_path / f"x.{suffix}", content)
    del content
    tracemalloc.start()
    texts, bad = read(path, max_line_bytes=1 << 20)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts == {"x": ["after"]}
    assert len(bad) == 1 and bad[0].offset == 0
    assert peak_bytes < 20 << 20


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst"])
def test_a_cut_archive_is_an_error(tmp_path, suffix):
    path = write(tmp_path / f"x.{suffix}", lines_of({"text": text} for text in make_texts(0, 500)))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"x\.{suffix} is corrupt or cut short"):
        read(path)


def test_a_broken_parquet_file_is_an_error(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(ValueError, match=r"x\.parquet"):
        read(tmp_path)


def test_inputs_that_change_or_vanish(tmp_path):
    path = write(tmp_path / "x.jsonl", lines_of([{"text": "a"}]))
    units = find_units([str(path)])
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(ValueError, match="changed while"):
        list(read_unit(units[0]))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"x\.jsonl"):
        list(read_unit(units[0]))


def test_inputs_are_checked(tmp_path):
    with pytest.raises(ValueError, match="none does not exist"):
        find_units([str(tmp_path / "none")])
    (tmp_path / "a").mkdir()
    (tmp_path / "a/readme.md").write_text("no data")
    with pytest.raises(ValueError, match="holds no"):
        find_units([str(tmp_path / "a")])
    path = write(tmp_path / "b/x.jsonl", lines_of([{"text": "a"}]))
    with pytest.raises(ValueError, match="given twice"):
        find_units([str(path), str(path.parent)])


def test_units_do_not_depend_on_where_the_input_lies(tmp_path):
    def listed(root):
        write_redpajama(root)
        return [(unit.subset, unit.name, unit.begin, unit.end) for unit in find_units([str(root)])]

    assert listed(tmp_path / "a/one") == listed(tmp_path / "two")


def test_subset_names_are_file_names(tmp_path):
    write(tmp_path / "in/my data/x.jsonl", lines_of([{"text": "a"}]))
    write(tmp_path / "in/manifest/x.jsonl", lines_of([{"text": "b"}]))
    assert set(read(tmp_path / "in")[0]) == {"my_data", "manifest_data"}
