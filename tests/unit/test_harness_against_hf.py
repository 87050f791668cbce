"""The harness' model against lm-eval's own ``hf`` on the export: 200 requests of each type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")
pytest.importorskip("transformers", reason="the extra hf is not installed")

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import ultramem_ds.hf  # noqa: F401 - registers the model family
from tests.harness_toys import harness_lm, random_pairs
from tests.unit.exported_models import random_model, small_tokenizer, write_model
from ultramem_ds.exchange.directory import export_hf
from ultramem_ds.infer.prepare import prepare_for_decoding

pytestmark = pytest.mark.slow

MAX_LENGTH = 64
# fp32 logits that two programs computed in another order, up to 130 of them added up in fp64.
TOLERANCE = 1e-4


def mask_padding(entries: int):
    """A hook that takes the probability of the vocabulary's padding away, as ours has none."""

    def hook(module: torch.nn.Module, args: Any, output: Any) -> Any:
        output.logits[..., entries:] = float("-inf")
        return output

    return hook


@pytest.fixture(scope="module", params=["dense", "pkm", "moe", "ultramem", "ultramem-other"])
def both(request, tmp_path_factory) -> tuple[TemplateLM, TemplateLM]:
    """Ours and theirs of one model. Theirs adds log-probabilities up in fp64, as ours does."""
    root = tmp_path_factory.mktemp("both")
    model, tokenizer = random_model(request.param), small_tokenizer()
    exported = export_hf(write_model(model, root / "run"), root / "export", "fp32", 10**9).directory
    ours = harness_lm(prepare_for_decoding(model), tokenizer, max_length=MAX_LENGTH)
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    theirs.register_forward_hook(mask_padding(tokenizer.vocab_size))
    hf = HFLM(
        pretrained=theirs,
        tokenizer=AutoTokenizer.from_pretrained(exported),
        batch_size=16,
        max_length=MAX_LENGTH,
        add_bos_token=False,
        softmax_dtype=torch.float64,
        logits_cache=False,  # lm-eval 0.4.13 reads the wrong end of a window that two texts share
    )
    return ours, hf


def ask(lm: TemplateLM, kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    requests = [
        Instance(request_type=kind, doc={}, arguments=args, idx=0, metadata=("toy", i, 1))
        for i, args in enumerate(arguments)
    ]
    answers: list[Any] = getattr(lm, kind)(requests, disable_tqdm=True)
    return answers


def test_log_likelihoods(both):
    """Letters after shared shots, endings, plain pairs, no context, contexts too long."""
    ours, theirs = (ask(lm, "loglikelihood", random_pairs(200)) for lm in both)
    for (logprob, greedy), (other, other_greedy) in zip(ours, theirs, strict=True):
        assert logprob == pytest.approx(other, abs=TOLERANCE)
        assert greedy == other_greedy


def test_two_contexts_to_one_ending(both):
    """WinoGrande's questions: the option stands in the context, the choice is the same."""
    pairs = random_pairs(300)
    questions = [
        (pairs[3 * i][0][:40], pairs[3 * i + 1][1], pairs[3 * i + 2][1]) for i in range(100)
    ]
    asked = [
        (f"{question} {option}", f" went {ending}")
        for question, ending, option in questions
        for option in ("sun", f"{option} pen")
    ]
    found = []
    for lm in both:
        logprobs = [logprob for logprob, _ in ask(lm, "loglikelihood", asked)]
        found.append(torch.tensor(logprobs).view(100, 2))
    torch.testing.assert_close(*found, rtol=0, atol=TOLERANCE)
    assert torch.equal(*(logprobs.argmax(1) for logprobs in found))


def test_whole_texts(both):
    """Up to three windows of the model's length."""
    texts = [("".join(pair) * (1 + i % 3),) for i, pair in enumerate(random_pairs(200))]
    ours, theirs = (ask(lm, "loglikelihood_rolling", texts) for lm in both)
    assert ours == pytest.approx(theirs, abs=TOLERANCE)


def test_generated_texts(both):
    """Stop strings that these models do produce; prompts that have to be cut among them."""
    prompts = list(dict.fromkeys(pair[0] for pair in random_pairs(600) if pair[0]))[:200]
    free = ask(both[0], "generate_until", [(prompts[0], {"until": [], "max_gen_toks": 12})])[0]
    settings = {"until": [free[3:5], "zz"], "max_gen_toks": 12, "do_sample": False}
    ours, theirs = (ask(lm, "generate_until", [(p, settings) for p in prompts]) for lm in both)
    assert ours == theirs
    assert len(ours) == 200 and len(set(ours)) > 60
