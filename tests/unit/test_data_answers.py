"""Prompts and answers: what counts, how it is stored, loaded and averaged."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.unit.data_corpus import lines_of, make_texts, small_tokenizer
from ultramem_ds.config.load import load_config
from ultramem_ds.data.answers import Segment, encode_answers, segments_of
from ultramem_ds.data.indexed import IndexedDataset, mask_path, open_mask
from ultramem_ds.data.inspect import verify
from ultramem_ds.data.loader import BatchLoader
from ultramem_ds.data.manifest import load_manifest
from ultramem_ds.data.mixture import Mixture
from ultramem_ds.data.options import ReadOptions
from ultramem_ds.data.prepare import PrepareConfig, prepare
from ultramem_ds.data.tokenizers import load_tokenizer
from ultramem_ds.model.init import init_module
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.train.evaluate import evaluate

FILES = Path(__file__).parents[1] / "data" / "files"
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": [{"type": "text", "text": "bye"}]},
    {"role": "assistant", "content": "see you"},
]


def counted(tokenizer, ids, mask):
    """Text of the document and of the runs of ids that count, end-of-text ids as a bar."""

    def text_of(part):
        at_ends = np.flatnonzero(part == tokenizer.eos_id) + 1
        pieces = [tokenizer.decode(p.tolist()) for p in np.split(part, at_ends)]
        return "|".join(pieces)

    edges = np.flatnonzero(np.diff(mask, prepend=0, append=0))
    return text_of(ids), [text_of(ids[a:b]) for a, b in zip(edges[::2], edges[1::2])]


def test_what_counts_in_a_chat():
    segments = segments_of({"messages": CHAT}, "chat")
    ids, lengths, mask = encode_answers(small_tokenizer(), [segments], np.uint16)
    text, runs = counted(small_tokenizer(), ids, mask)
    assert text == (
        "<|system|>\nbe brief\n<|user|>\nhi\n<|assistant|>\nhello|\n<|user|>\nbye\n<|assistant|>\n"
        "see you|"
    )
    assert runs == ["hello|", "see you|"]
    assert lengths.tolist() == [len(ids)]


def test_other_spellings_of_chats():
    shared = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert segments_of({"conversations": shared}, "chat") == segments_of(
        {"messages": [{"role": "User", "content": "q"}, {"role": "model", "content": "a"}]}, "chat"
    )
    context = [{"role": "assistant", "content": "x", "weight": 0}, *CHAT[1:3]]
    segments = segments_of({"messages": context}, "chat")
    assert [s.text for s in segments if s.answer] == ["hello"]
    open_end = segments_of({"messages": CHAT[:4]}, "chat")
    ids, _, mask = encode_answers(small_tokenizer(), [open_end], np.uint16)
    assert ids[-1] == small_tokenizer().eos_id and mask[-1] == 0, (
        "the user's last word is no answer"
    )


def test_completions():
    for row in ({"prompt": "p", "completion": "c"}, {"question": "p", "answer": "c"}):
        assert segments_of(row, "completion") == (Segment("p", False), Segment("c", ends=True))
    alpaca = {"instruction": "do", "input": "this", "output": "done"}
    assert segments_of(alpaca, "completion")[0].text == "do\n\nthis"
    ids, _, mask = encode_answers(
        small_tokenizer(),
        [segments_of({"prompt": "", "completion": "abc"}, "completion")],
        np.uint16,
    )
    assert mask.tolist() == [0, *[1] * (len(ids) - 1)], "nothing predicts a document's first token"


BAD = {
    "completion": [
        ({"text": "t"}, "no prompt"),
        ({"prompt": "p"}, "no completion"),
        ({"prompt": "p", "completion": ""}, "completion is empty"),
        ({"prompt": ["p"], "completion": "c"}, "no prompt"),
    ],
    "chat": [
        ({"text": "t"}, "no list of messages"),
        ({"messages": []}, "no message of an assistant"),
        ({"messages": CHAT[:2]}, "no message of an assistant"),
        ({"messages": ["hi"]}, "is no object"),
        ({"messages": [{"content": "x"}]}, "no role"),
        ({"messages": [{"role": "assistant", "content": None}]}, "no text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "no text"),
    ],
}


@pytest.mark.parametrize("form", BAD)
def test_records_without_an_answer_are_bad(form):
    for row, reason in BAD[form]:
        assert reason in segments_of(row, form), row


def test_no_space_is_put_before_an_answer():
    tokenizer = load_tokenizer(FILES / "llama_like.model")
    segments = (Segment("a prompt:", False), Segment("answer", ends=True))
    ids, _, mask = encode_answers(tokenizer, [segments], np.uint16)
    assert tokenizer.decode(ids.tolist()) == "a prompt:answer"
    assert tokenizer.decode(ids[mask == 1].tolist()) == "answer"
    # What `generate` is given is the beginning of what was trained on.
    prompt = tokenizer.encode("a prompt:")
    assert ids[: len(prompt)].tolist() == prompt and not mask[: len(prompt)].any()


@pytest.fixture(scope="module")
def prepared_answers(tmp_path_factory):
    """Prompts with answers, and one plain subset beside them made apart."""
    root = tmp_path_factory.mktemp("answers")
    small_tokenizer().save(root)
    rows = [{"prompt": f"Q {text[:9]}\nA", "completion": text[9:]} for text in make_texts(100, 200)]
    (root / "qa.jsonl").write_bytes(lines_of([*rows, {"prompt": "no answer"}]))
    config = PrepareConfig(validation_share=0.2, reading=ReadOptions(format="completion"))
    prepare([root / "qa.jsonl"], root / "data", root / "tokenizer.json", config)
    return root / "data", rows


def test_the_mask_lies_beside_the_tokens(prepared_answers):
    data, rows = prepared_answers
    manifest = load_manifest(data)
    found = []
    for info in manifest.subsets:
        prefix = data / ("validation" if info.split == "validation" else "") / info.subset
        dataset, mask = IndexedDataset(prefix), open_mask(prefix)
        assert info.masked and info.answer_tokens == int(mask.sum())
        assert mask.shape == (info.tokens,)
        for ids, begin in zip(dataset, dataset.offsets // 2):
            found.append(counted(small_tokenizer(), ids, mask[begin : begin + len(ids)]))
    expected = [(f"{row['prompt']}{row['completion']}|", [f"{row['completion']}|"]) for row in rows]
    assert sorted(found) == sorted(expected)
    assert manifest.bad_records == {"no completion / answer / response / output": 1}
    verify(data)


def test_workers_change_nothing_and_masks_are_part_of_a_pair(prepared_answers, tmp_path):
    data, _ = prepared_answers
    config = PrepareConfig(
        validation_share=0.2, reading=ReadOptions(format="completion"), workers=2
    )
    source = data.parent / "qa.jsonl"
    prepare([source], tmp_path / "again", data, config)
    name = mask_path(Path("qa")).name
    assert (tmp_path / "again" / name).read_bytes() == (data / name).read_bytes()
    (tmp_path / "again" / name).unlink()
    with pytest.raises(ValueError, match="missing or torn"):
        load_manifest(tmp_path / "again")
    assert prepare([source], tmp_path / "again", data, config) is not None
    with pytest.raises(ValueError, match="other inputs, options"):
        prepare([source], tmp_path / "again", data, PrepareConfig(validation_share=0.2))


def loader_of(data, **options):
    mixture = Mixture(data, "train", seq_len=32, weights={}, seed=0)
    return mixture, BatchLoader(
        mixture, global_batch_size=4, micro_batch_size=2, rank=0, world_size=1, **options
    )


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_loader_carries_the_mask_of_the_targets(prepared_answers, num_workers):
    data, _ = prepared_answers
    mixture, loader = loader_of(data, num_workers=num_workers)
    mask = open_mask(data / "qa")
    batch = next(iter(loader))
    loader.close()
    assert batch.loss_mask.shape == (2, 32) and batch.loss_mask.dtype == torch.bool
    for row, sample in zip(batch.loss_mask, batch.sample_ids):
        begin = mixture.locate(sample).sequence * 32 + 1
        assert row.tolist() == mask[begin : begin + 32].astype(bool).tolist()
    assert batch.num_targets == int(batch.loss_mask.sum())


def test_plain_text_has_no_mask(tmp_path):
    small_tokenizer().save(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(lines_of({"text": text} for text in make_texts(0, 50)))
    config = PrepareConfig(validation_share=0)
    prepare([tmp_path / "a.jsonl"], tmp_path / "data", tmp_path, config)
    _, loader = loader_of(tmp_path / "data", num_workers=0)
    batch = next(iter(loader))
    assert batch.loss_mask is None and batch.num_targets == 2 * 32


@pytest.mark.parametrize("preset", ["dense-debug", "pkm-debug", "moe-debug", "ultramem-debug"])
def test_the_loss_is_the_mean_over_answers(preset):
    config = load_config(preset, ["model.vocab_size=64", "model.seq_len=16"])
    model = LanguageModel(config).eval()
    init_module(model, config, 0)
    torch.manual_seed(0)
    tokens = torch.randint(64, (2, 17))
    mask = torch.rand(2, 16) < 0.3
    logits = model.logits(tokens[:, :-1]).log_softmax(-1)
    nats = -logits.gather(2, tokens[:, 1:, None])[..., 0]
    loss = model(tokens, loss_mask_BS=mask)["loss"]
    torch.testing.assert_close(loss, nats[mask].mean(), rtol=1e-5, atol=0)
    none = model(tokens, loss_mask_BS=torch.zeros_like(mask))["loss"]
    assert none.item() == 0 and torch.autograd.grad(none, model.head.weight)[0].abs().max() == 0
    torch.testing.assert_close(
        model(tokens, loss_mask_BS=torch.ones_like(mask))["loss"], nats.mean()
    )


def test_validation_counts_answers_alone(prepared_answers):
    data, _ = prepared_answers
    config = load_config("dense-debug", ["model.vocab_size=400", "model.seq_len=32"])
    seen = []

    def loss_of(batch):
        loss = batch.loss_mask.float().mean().double()
        seen.append((batch.num_targets, float(loss)))
        return loss

    found = evaluate(loss_of, data, config, micro_batch_size=3)
    targets = sum(count for count, _ in seen)
    assert found["qa"].tokens == targets == found["all"].tokens
    mean = sum(count * loss for count, loss in seen) / targets
    assert found["qa"].loss == pytest.approx(mean, rel=1e-12)


def test_chat_files_of_any_layout(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"messages": CHAT}] * 3, indent=1))
    small_tokenizer().save(tmp_path)
    config = PrepareConfig(validation_share=0, reading=ReadOptions(format="chat"))
    manifest = prepare([tmp_path / "a.json"], tmp_path / "data", tmp_path, config)
    assert manifest is not None and manifest.account["documents"] == 3
    with pytest.raises(ValueError, match="no document with text in 3 records, 3 x no prompt"):
        other = PrepareConfig(reading=ReadOptions(format="completion"))
        prepare([tmp_path / "a.json"], tmp_path / "other", tmp_path, other)
