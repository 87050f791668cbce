"""Tokenizers: lossless, safe against text that spells special tokens, saved byte for byte."""

import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data_corpus import make_texts, small_tokenizer
from ultramem_ds.data.tokenizer_training import train_on_inputs, train_tokenizer
from ultramem_ds.data.tokenizers import HuggingFaceTokenizer, load_tokenizer
from ultramem_ds.infer.text import Detokenizer

NEOX = os.environ.get("ULTRAMEM_TEST_NEOX_TOKENIZER")
# Any Unicode text: surrogates are not text.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
SPECIAL = "a <|endoftext|> b </s> c <s> <unk> <|padding|> <0x41>"


@pytest.fixture(scope="module")
def sentencepiece():
    return train_tokenizer(make_texts(0, 200), kind="sentencepiece", vocab_size=400)


@given(text=TEXTS)
@settings(max_examples=300, deadline=None)
def test_bpe_round_trip(text):
    tokenizer = small_tokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert tokenizer.eos_id not in ids


@given(text=TEXTS)
@settings(max_examples=100, deadline=None)
def test_streamed_decoding_adds_up(text):
    tokenizer = small_tokenizer()
    decoder = Detokenizer(tokenizer)
    pieces = [decoder.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) + decoder.rest() == text


def test_a_character_appears_when_it_is_complete():
    tokenizer = small_tokenizer()
    ids = tokenizer.encode("🎉")
    assert len(ids) > 1, "the emoji is not in the training text"
    decoder = Detokenizer(tokenizer)
    assert [decoder.push(token) for token in ids] == [""] * (len(ids) - 1) + ["🎉"]
    assert decoder.push(ids[0]) == ""
    assert decoder.rest() == "\ufffd"


def test_sentencepiece_round_trip(sentencepiece):
    for text in [*make_texts(500, 20), "", " ", "  a\n\n\tb ", "日本語 🎉 \x00", SPECIAL]:
        ids = sentencepiece.encode(text)
        assert sentencepiece.decode(ids) == text
        assert sentencepiece.eos_id not in ids
        decoder = Detokenizer(sentencepiece)
        assert "".join(map(decoder.push, ids)) + decoder.rest() == text


def test_special_spelling_stays_text():
    tokenizer = small_tokenizer()
    assert tokenizer.eos_id not in tokenizer.encode(SPECIAL)
    assert tokenizer.decode(tokenizer.encode(SPECIAL)) == SPECIAL


def test_an_end_of_text_token_that_is_not_marked_special_is_safe_too():
    content = json.loads(small_tokenizer().content)
    content["added_tokens"][0]["special"] = False
    content["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    tokenizer = HuggingFaceTokenizer(json.dumps(content).encode())
    text = "one two three four five <|endoftext|>"
    assert tokenizer.eos_id not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text, "truncation must be off"


def test_documents_end_in_the_end_of_text_id(sentencepiece):
    for tokenizer in (small_tokenizer(), sentencepiece):
        texts = ["one", "", "three words here"]
        ids, lengths = tokenizer.encode_documents(texts, np.uint16)
        assert ids.dtype == np.uint16
        expected = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
        assert lengths.tolist() == list(map(len, expected))
        assert ids.tolist() == [token for document in expected for token in document]


def test_padding_ids_decode_to_nothing(sentencepiece):
    for tokenizer in (small_tokenizer(), sentencepiece):
        ids = tokenizer.encode("text")
        padded = [*ids, tokenizer.vocab_size, tokenizer.vocab_size + 100, tokenizer.eos_id]
        assert tokenizer.decode(padded) == "text"


def test_surrogates_are_refused(sentencepiece):
    for tokenizer in (small_tokenizer(), sentencepiece):
        with pytest.raises(ValueError, match="UTF-8"):
            tokenizer.encode("\ud800")


def test_copies_are_exact_and_training_is_deterministic(tmp_path, sentencepiece):
    for tokenizer in (small_tokenizer(), sentencepiece):
        path = tokenizer.save(tmp_path)
        assert load_tokenizer(path).hash == tokenizer.hash
        assert load_tokenizer(str(path)).encode("abc") == tokenizer.encode("abc")
    again = train_tokenizer(make_texts(0, 200), kind="bpe", vocab_size=400)
    assert again.hash == small_tokenizer().hash
    assert load_tokenizer(tmp_path).hash == small_tokenizer().hash  # a directory


def test_training_on_files(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{k} words"}}\n' for k in range(50)))
    path, tokenizer = train_on_inputs([tmp_path], tmp_path / "out/t.json", vocab_size=300)
    assert path.read_bytes() == tokenizer.content
    assert tokenizer.eos_id == 0 and tokenizer.vocab_size <= 300
    (tmp_path / "b.jsonl").write_text('{"no": "text"}\n')
    with pytest.raises(ValueError, match="no document"):
        train_on_inputs([tmp_path / "b.jsonl"], tmp_path / "t.json")
    with pytest.raises(ValueError, match="vocab_size=100"):
        train_on_inputs([tmp_path / "a.jsonl"], tmp_path / "t.json", vocab_size=100)


def test_bad_files_are_refused_by_name(tmp_path):
    for name, content in {"a.json": b"{}", "b.json": b"{", "c.model": b"\x00nonsense"}.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=name):
            load_tokenizer(path)
    with pytest.raises(ValueError, match="neither tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        load_tokenizer(tmp_path / "none.json")


@pytest.mark.skipif(not NEOX, reason="ULTRAMEM_TEST_NEOX_TOKENIZER is not set")
def test_gpt_neox():
    assert NEOX is not None
    tokenizer = load_tokenizer(NEOX)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (50_277, 0)
    ids = tokenizer.encode(SPECIAL + "   indented 東京")
    assert 0 not in ids and 1 not in ids
    assert tokenizer.decode(ids) == SPECIAL + "   indented 東京"
    assert tokenizer.decode([50_300, *ids[:1]]) == "a"
