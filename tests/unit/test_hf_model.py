"""transformers' model of an export against the program's own: logits, decoding, padding, caches."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the extra hf is not installed")
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache, pipeline

import ultramem_ds.hf
from tests.unit.exported_models import (
    ENTRIES,
    KINDS,
    greedy,
    padded,
    prompts_of,
    random_model,
    small_tokenizer,
    write_model,
)
from ultramem_ds.exchange.directory import export_hf
from ultramem_ds.hf import UltraMemForCausalLM
from ultramem_ds.model.lm import LanguageModel

PROMPTS = prompts_of(2, 5, 11, 20)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def models() -> dict[str, LanguageModel]:
    return {kind: random_model(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def exports(models, tmp_path_factory) -> Path:
    """A directory with an export of every kind."""
    root = tmp_path_factory.mktemp("exports")
    for kind, model in models.items():
        run_dir = write_model(model, tmp_path_factory.mktemp(kind) / "run")
        export_hf(run_dir, root / kind, "fp32", 10**9)
    return root


@pytest.fixture(scope="module")
def ours(models, kind) -> LanguageModel:
    return models[kind]


@pytest.fixture(scope="module")
def exported(exports, kind) -> Path:
    return exports / kind


@pytest.fixture(scope="module")
def theirs(exported) -> UltraMemForCausalLM:
    model, info = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model) is ultramem_ds.hf.UltraMemForCausalLM and not model.training
    return model


def ended(row: list[int]) -> list[int]:
    return row[: row.index(0)] if 0 in row else row


@torch.no_grad()
def test_logits_of_a_padded_batch_are_ours_of_each_prompt(ours, theirs):
    # fp32 sums in another order: a few ulp per block, far below 1e-5 of the largest logit.
    batch = theirs(**padded(PROMPTS)).logits
    eager = theirs.model.config._attn_implementation
    theirs.set_attn_implementation("eager")
    unpadded = [theirs(torch.tensor([p])).logits[0] for p in PROMPTS]
    theirs.set_attn_implementation(eager)
    for row, prompt, alone in zip(batch, PROMPTS, unpadded):
        expected = ours.logits(torch.tensor([prompt]))[0]
        scale = float(expected.abs().max())
        torch.testing.assert_close(row[-len(prompt) :], expected, rtol=0, atol=1e-5 * scale)
        torch.testing.assert_close(alone, expected, rtol=0, atol=1e-5 * scale)


@torch.no_grad()
def test_greedy_continuations_are_ours(ours, theirs):
    """64 tokens of prompts of different lengths, with a growing and with a static cache."""
    expected = greedy(ours, PROMPTS, 64)
    width = max(map(len, PROMPTS))
    for cache in (None, "static"):
        out = theirs.generate(
            **padded(PROMPTS), max_new_tokens=64, do_sample=False, cache_implementation=cache
        )
        assert [ended(row) for row in out[:, width:].tolist()] == expected


@torch.no_grad()
def test_cached_forwards_in_pieces_equal_one_forward(theirs):
    """Chunks of every length, so that convolution states shorter than the kernel occur."""
    ids = torch.tensor([PROMPTS[3]])
    whole = theirs(ids, use_cache=False).logits
    scale = float(whole.abs().max())
    for cache in (
        DynamicCache(config=theirs.config),
        StaticCache(config=theirs.config, max_cache_len=32),
    ):
        parts = [
            theirs(part, past_key_values=cache).logits for part in ids.split([1, 1, 3, 7, 8], 1)
        ]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5 * scale)


@torch.no_grad()
def test_beam_search_reorders_the_convolution_states_too(theirs):
    arguments = dict(**padded(PROMPTS), max_new_tokens=12, num_beams=3, do_sample=False)
    cached = theirs.generate(**arguments)
    assert torch.equal(cached, theirs.generate(**arguments, use_cache=False))


@torch.no_grad()
def test_padding_is_seen_by_nobody(theirs):
    """What stands in padded positions changes nothing, to the last bit."""
    batch = padded(PROMPTS)
    noise = torch.where(batch["attention_mask"] == 1, batch["input_ids"], 7)
    real = batch["attention_mask"].bool()
    changed = theirs(input_ids=noise, attention_mask=batch["attention_mask"]).logits
    assert torch.equal(changed[real], theirs(**batch).logits[real])


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(ours, theirs):
    first, second = PROMPTS[1], PROMPTS[2]
    positions = torch.tensor([[*range(len(first)), *range(len(second))]])
    ids = torch.tensor([first + second])
    logits = theirs(ids, position_ids=positions, use_cache=False).logits[0, len(first) :]
    expected = ours.logits(torch.tensor([second]))[0]
    scale = float(expected.abs().max())
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * scale)


def test_save_pretrained_writes_the_same_export(exported, theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    before = load_file(exported / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype and torch.equal(after[name], value), name
    config, again = (
        json.loads((where / "config.json").read_text()) for where in (exported, tmp_path)
    )
    assert config.items() <= {**again, "auto_map": config["auto_map"]}.items()


_REMOTE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ultramem_ds":
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoModel, AutoModelForCausalLM
exports, ids, out, *kinds = sys.argv[1:]
found = {}
for kind in kinds:
    where = exports + "/" + kind
    model = AutoModelForCausalLM.from_pretrained(where, trust_remote_code=True)
    base = AutoModel.from_pretrained(where, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    with torch.no_grad():
        found[kind] = model(**torch.load(ids)).logits
        hidden = base(**torch.load(ids)).last_hidden_state
        assert torch.equal(model.lm_head(hidden), found[kind])
torch.save(found, out)
"""


def test_remote_code_stands_alone_and_agrees(exports, tmp_path):
    """In a process that cannot import this package."""
    batch = padded(PROMPTS)
    torch.save(batch, tmp_path / "ids.pt")
    arguments = [exports, tmp_path / "ids.pt", tmp_path / "out.pt", *KINDS]
    subprocess.run(
        [sys.executable, "-c", _REMOTE, *map(str, arguments)],
        check=True,
        env={"HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    for kind, logits in torch.load(tmp_path / "out.pt").items():
        with torch.no_grad():
            plugin = AutoModelForCausalLM.from_pretrained(exports / kind)
            assert torch.equal(logits, plugin(**batch).logits), kind


def test_pipeline_speaks_the_tokenizers_language(exported, theirs, ours):
    tokenizer = AutoTokenizer.from_pretrained(exported)
    text = "def test_pipeline(<|endoftext|>"
    ids = small_tokenizer().encode(text)
    assert tokenizer(text)["input_ids"] == ids
    generate = pipeline("text-generation", model=theirs, tokenizer=tokenizer)
    made = generate(text, max_new_tokens=8, do_sample=False, return_full_text=False)
    assert made[0]["generated_text"] == small_tokenizer().decode(greedy(ours, [ids], 8)[0])


@torch.no_grad()
def test_padding_of_the_vocabulary_is_never_sampled(theirs):
    theirs.lm_head.weight.data[ENTRIES:] += 100 * theirs.lm_head.weight.data[:1]
    out = theirs.generate(**padded(PROMPTS), max_new_tokens=8, do_sample=True, temperature=5.0)
    assert int(out.max()) < ENTRIES
