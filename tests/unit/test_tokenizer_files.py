"""Which file a tokenizer is, what ends its texts, what it loses, and text that streams from it."""

import base64
import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from tests.unit.data_corpus import lines_of, make_texts, small_tokenizer
from ultramem_ds.data.manifest import load_manifest
from ultramem_ds.data.prepare import PrepareConfig, prepare
from ultramem_ds.data.same_tokenizer import data_tokenizer, require_same_tokenizer
from ultramem_ds.data.tokenizer_files import EndOfText
from ultramem_ds.data.tokenizer_losses import LossCounter
from ultramem_ds.data.tokenizer_training import train_tokenizer
from ultramem_ds.data.tokenizers import END_OF_TEXT, load_tokenizer
from ultramem_ds.infer.text import Detokenizer

FILES = Path(__file__).parents[1] / "data" / "files"
LLAMA_LIKE = FILES / "llama_like.model"


def with_tokens(*names, known=True):
    """The small tokenizer with further special tokens; without ``known``, the old one renamed."""
    description = json.loads(small_tokenizer().content)
    if not known:
        description["added_tokens"][0]["content"] = "<ours>"
        description["model"]["vocab"]["<ours>"] = description["model"]["vocab"].pop(END_OF_TEXT)
    for name in names:
        token = {**description["added_tokens"][0], "content": name}
        token["id"] = len(description["model"]["vocab"]) + len(description["added_tokens"]) - 1
        description["added_tokens"].append(token)
    return json.dumps(description)


def write_all(directory, **files):
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (directory / f"{name}.json").write_text(text)
    return directory


def test_end_of_text_by_the_files_beside_the_tokenizer(tmp_path):
    files = {"tokenizer": with_tokens("</s>", "<eos>", "<end>")}
    for extra, token, source in [
        ({}, END_OF_TEXT, ""),
        ({"generation_config": {"eos_token_id": [401, 402]}}, "<eos>", "generation_config.json"),
        (
            {"special_tokens_map": {"eos_token": {"content": "<end>"}}},
            "<end>",
            "special_tokens_map.json",
        ),
        ({"tokenizer_config": {"eos_token": "</s>"}}, "</s>", "tokenizer_config.json"),
    ]:  # each takes precedence over those before it
        files |= extra
        directory = write_all(tmp_path / "t", **files)
        for path in (directory, directory / "tokenizer.json"):
            tokenizer = load_tokenizer(path)
            assert (tokenizer.end_of_text.token, tokenizer.end_of_text.source) == (token, source)
            assert tokenizer.encode_documents(["a"], np.int64)[0][-1] == tokenizer.eos_id
    chosen = load_tokenizer(directory, "<eos>")
    assert (chosen.end_of_text.token, chosen.end_of_text.source) == ("<eos>", "--eod-token")
    assert not chosen.end_of_text.rivals
    assert load_tokenizer(write_all(tmp_path / "u", tokenizer=files["tokenizer"])).end_of_text == (
        EndOfText(END_OF_TEXT, rivals=("</s>", "<eos>"))
    )
    write_all(directory, tokenizer_config={"eos_token": None})
    assert load_tokenizer(directory).end_of_text.token == "<end>"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": {"eos_token": "<gone>"}}, "tokenizer_config.json names '<gone>'"),
        ({"generation_config": {"eos_token_id": 9999}}, "generation_config.json names id 9999"),
        ({"tokenizer_config": [1]}, "no JSON object"),
        ({"special_tokens_map": "{"}, "special_tokens_map.json is not valid JSON"),
    ],
)
def test_files_that_name_what_is_not_there(tmp_path, files, message):
    write_all(tmp_path, tokenizer=small_tokenizer().content.decode(), **files)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_a_token_of_the_users_own(tmp_path):
    write_all(tmp_path, tokenizer=with_tokens(known=False))
    with pytest.raises(ValueError, match="no end-of-text token.*--eod-token"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="no token '<gone>'"):
        load_tokenizer(tmp_path, "<gone>")
    tokenizer = load_tokenizer(tmp_path, "<ours>")
    assert tokenizer.eos_id not in tokenizer.encode("a <ours> b")


@pytest.mark.parametrize("name", ["<\uff5cend\u2581of\u2581sentence\uff5c>", "<|eod|>"])
def test_names_of_published_tokenizers(tmp_path, name):
    write_all(tmp_path, tokenizer=with_tokens(name, known=False))
    assert load_tokenizer(tmp_path).end_of_text.token == name


def test_prepared_data_keeps_the_choice(tmp_path):
    """The directory loads with the same end of text, whatever chose it, and copies go along."""
    (tmp_path / "a.jsonl").write_bytes(lines_of({"text": text} for text in make_texts(0, 9)))
    config = {"eos_token": "</s>", "chat_template": "kept"}
    source = write_all(
        tmp_path / "t", tokenizer=with_tokens("</s>", "<eos>"), tokenizer_config=config
    )
    prepare([tmp_path / "a.jsonl"], tmp_path / "named", source)
    copy = (tmp_path / "named/tokenizer_config.json").read_bytes()
    assert copy == (source / "tokenizer_config.json").read_bytes()
    prepare([tmp_path / "a.jsonl"], tmp_path / "chosen", source, PrepareConfig(eod_token="<eos>"))
    changed = json.loads((tmp_path / "chosen/tokenizer_config.json").read_text())
    assert changed == {"eos_token": "<eos>", "chat_template": "kept"}
    for name, token in (("named", "</s>"), ("chosen", "<eos>")):
        tokenizer = data_tokenizer(tmp_path / name)
        assert tokenizer.end_of_text.token == token
        assert load_manifest(tmp_path / name).tokenizer.eos_id == tokenizer.eos_id
    with pytest.raises(ValueError, match="other inputs, options or another tokenizer"):
        prepare(
            [tmp_path / "a.jsonl"], tmp_path / "named", source, PrepareConfig(eod_token="<eos>")
        )


def test_an_earlier_tokenizer_of_another_kind_does_not_stay(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines_of({"text": text} for text in make_texts(0, 9)))
    write_all(tmp_path / "t", tokenizer=with_tokens("</s>"))
    prepare([tmp_path / "a.jsonl"], tmp_path / "o", tmp_path / "t", PrepareConfig(eod_token="</s>"))
    assert (tmp_path / "o/tokenizer_config.json").is_file()
    again = PrepareConfig(overwrite=True)
    prepare([tmp_path / "a.jsonl"], tmp_path / "o", LLAMA_LIKE, again)
    assert data_tokenizer(tmp_path / "o").hash == load_tokenizer(LLAMA_LIKE).hash


TIKTOKEN = b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256))
OTHER_KINDS = {
    "tokenizer.model": (TIKTOKEN, "tiktoken"),
    "a.json": (b'{"eos_token": "</s>"}', "configuration; give the tokenizer itself"),
    "vocab.json": (b'{"a": 0, "b": 1}', "bare vocabulary"),
    "tekken.json": (b'{"config": {}, "vocab": []}', "tekken"),
    "b.json": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    "c.json": (b"<!doctype html>", "HTML"),
    "d.json": (b"", "empty"),
    "e.json": ("{}".encode("utf-16"), "UTF-16"),
    "f.json": (gzip.compress(b"{}"), "gzip"),
}


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_files_that_are_no_tokenizer_are_named(tmp_path, name):
    content, what = OTHER_KINDS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is .*{what}"):
        load_tokenizer(tmp_path / name)


def test_a_byte_order_mark_before_the_json(tmp_path):
    (tmp_path / "t.json").write_bytes(b"\xef\xbb\xbf" + small_tokenizer().content)
    assert load_tokenizer(tmp_path / "t.json").hash == small_tokenizer().hash


def test_a_directory_with_a_vocabulary_and_merges_alone(tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match="no tokenizer.json; transformers"):
        load_tokenizer(tmp_path)


def test_no_unknown_token_is_refused_with_the_character():
    with pytest.raises(ValueError, match="cannot encode 'E' and has no unknown token"):
        load_tokenizer(FILES / "unigram_nounk.json")


def test_dropped_characters_are_counted(tmp_path, caplog):
    tokenizer = load_tokenizer(FILES / "charbpe_nounk.json")
    texts = ["alpha 北北 beta", "gamma É\n"]
    losses = LossCounter(tokenizer).count(texts, np.array([], np.int32))
    assert dict(losses.dropped) == {"北": 2, "É": 1, "\n": 1}
    (tmp_path / "a.jsonl").write_bytes(lines_of({"text": text} for text in texts * 10))
    for workers in (1, 2):
        config = PrepareConfig(validation_share=0, workers=workers)
        manifest = prepare(
            [tmp_path], tmp_path / f"o{workers}", FILES / "charbpe_nounk.json", config
        )
        assert manifest is not None
        assert manifest.account["dropped_characters"] == {"北": 20, "\n": 10, "É": 10}
    assert "in a sample of 8 documents the tokenizer drops characters: 16" in caplog.text
    strict = PrepareConfig(strict=True)
    with pytest.raises(ValueError, match="--strict: in a sample of .* drops characters"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "s", FILES / "charbpe_nounk.json", strict)


def test_unknown_tokens_are_counted(tmp_path):
    words = {"<unk>": 0, "</s>": 1, "alpha": 2, "beta": 3}
    backend = Backend(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "t.json"))
    (tmp_path / "a.jsonl").write_bytes(lines_of([{"text": "alpha gamma delta beta"}]))
    manifest = prepare([tmp_path / "a.jsonl"], tmp_path / "o", tmp_path / "t.json")
    assert manifest is not None and manifest.account["unknown_tokens"] == 2


def test_nothing_is_lost_by_bytes():
    tokenizer = small_tokenizer()
    texts = [*make_texts(0, 5), "北 🙂 \x00 é"]
    ids, _ = tokenizer.encode_documents(texts, np.int32)
    assert LossCounter(tokenizer).count(texts, ids).describe() == []


def metaspace(tmp_path):
    """Llama's kind as a tokenizers JSON: a space before every text, byte fallback."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = [c for c in "abcdefghijklmnopqrstuvwxyzTI.,"]
    vocabulary = {p: i for i, p in enumerate(["</s>", *pieces, "\u2581", *letters])}
    backend = Backend(models.BPE(vocabulary, [], byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    backend.save(str(tmp_path / "m.json"))
    return load_tokenizer(tmp_path / "m.json")


def kinds(tmp_path):
    yield small_tokenizer()
    yield load_tokenizer(LLAMA_LIKE)
    yield train_tokenizer(make_texts(0, 200), kind="sentencepiece", vocab_size=400)
    yield metaspace(tmp_path)
    yield load_tokenizer(FILES / "charbpe_nounk.json")


def test_streamed_text_is_the_decoded_whole_sequence(tmp_path):
    """For ids as an untrained model draws them: cut characters, lone bytes, special tokens."""
    for tokenizer in kinds(tmp_path):
        draw = random.Random(0)
        for prompt in ("The", " a", "naïve 北", "x\n", ""):
            start = tokenizer.encode(prompt) or [tokenizer.eos_id]
            for length in (1, 5, 400):
                new = draw.choices(range(tokenizer.vocab_size), k=length)
                decoder = Detokenizer(tokenizer, start)
                streamed = "".join(decoder.push(token) for token in new)
                before = tokenizer.decode(start)
                whole = tokenizer.decode([*start, *new])
                if whole.startswith(before):  # a lone byte may undo the prompt's last character
                    assert before + streamed + decoder.rest() == whole, tokenizer.file_name


def test_no_space_is_lost_between_prompt_and_text(tmp_path):
    tokenizer = load_tokenizer(LLAMA_LIKE)
    (instance,) = [
        i for i in range(tokenizer.vocab_size) if tokenizer.decode([i, i]) == "instance instance"
    ]
    assert Detokenizer(tokenizer, tokenizer.encode("The")).all([instance]) == " instance"
    assert Detokenizer(tokenizer, []).all([instance]) == "instance", "at the start there is none"
    special = [tokenizer.eos_id] * 300
    assert Detokenizer(tokenizer, tokenizer.encode("The")).all([*special, instance]) == " instance"


def test_text_appears_as_soon_as_nothing_can_change_it(tmp_path):
    tokenizer = metaspace(tmp_path)
    decoder = Detokenizer(tokenizer, tokenizer.encode("a"))
    ids = tokenizer.encode("b")[1:] + tokenizer.encode("é")[1:] + tokenizer.encode("c")[1:]
    assert [decoder.push(token) for token in ids] == ["b", "", "", "éc"]


def test_a_model_meets_data_of_its_own_tokenizer_only(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines_of({"text": text} for text in make_texts(0, 9)))
    small_tokenizer().save(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    small_tokenizer().save(run)
    prepare([tmp_path / "a.jsonl"], tmp_path / "data", tmp_path / "tokenizer.json")
    assert require_same_tokenizer(run, tmp_path / "data").hash == small_tokenizer().hash
    # Written anew in another layout it is the same tokenizer.
    description = json.loads(small_tokenizer().content)
    (run / "tokenizer.json").write_text(json.dumps(description, indent=8))
    require_same_tokenizer(run, tmp_path / "data")
    # The same size, two ids exchanged.
    vocabulary = description["model"]["vocab"]
    a, b = list(vocabulary)[5:7]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (run / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(ValueError) as refused:
        require_same_tokenizer(run, tmp_path / "data")
    assert f"{run / 'tokenizer.json'}" in str(refused.value)
    assert f"{tmp_path / 'data/tokenizer.json'}" in str(refused.value)
    # The data's own file replaced.
    (tmp_path / "data/tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="is not the tokenizer that the data was made with"):
        data_tokenizer(tmp_path / "data")


def test_a_model_and_data_with_other_ends_of_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines_of({"text": text} for text in make_texts(0, 9)))
    source = write_all(tmp_path / "t", tokenizer=with_tokens("</s>"))
    run = tmp_path / "run"
    run.mkdir()
    load_tokenizer(source).save(run)
    prepare([tmp_path / "a.jsonl"], tmp_path / "data", source, PrepareConfig(eod_token="</s>"))
    with pytest.raises(ValueError, match=r"prepare the data with --eod-token '<\|endoftext\|>'"):
        require_same_tokenizer(run, tmp_path / "data")
