"""The harness' model against a plain scorer: one request at a time, the whole forward, no cache."""

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from tests.harness_toys import KINDS, byte_tokenizer, harness_lm, random_pairs, small_model
from ultramem_ds.harness.generation import Answer, cut_at
from ultramem_ds.infer.prepare import prepare_for_decoding

# fp32 sums of at most 96 terms in another order, through 4 blocks.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return byte_tokenizer(tmp_path_factory.mktemp("bytes"))


def instances(kind, arguments, task="toy"):
    return [
        Instance(request_type=kind, doc={}, arguments=args, idx=0, metadata=(task, i, 1))
        for i, args in enumerate(arguments)
    ]


@torch.no_grad()
def plain_logprobs(model, tokenizer, ids, max_length=96):
    """Log-probabilities of every token after the first, the last ``max_length`` read."""
    ids = ids[-(max_length + 1) :]
    logits = model.logits(torch.tensor([ids[:-1]]))[0, :, : tokenizer.vocab_size]
    return logits.log_softmax(-1), torch.tensor(ids[1:])


def plain_score(model, tokenizer, context, continuation):
    kept = context.rstrip()
    whole = tokenizer.encode(context + continuation)
    at = len(tokenizer.encode(kept))
    if not at:
        whole, at = [tokenizer.eos_id, *whole], 1
    logprobs, targets = plain_logprobs(model, tokenizer, whole)
    count = len(whole) - at
    chosen = logprobs[-count:].gather(1, targets[-count:, None]).sum()
    return float(chosen), bool((logprobs[-count:].argmax(-1) == targets[-count:]).all())


@pytest.mark.parametrize("kind", KINDS)
def test_every_log_likelihood_is_the_plain_scorers(kind, tokenizer):
    pairs = random_pairs(200)
    model = small_model(kind)
    expected = [plain_score(model, tokenizer, *pair) for pair in pairs]
    lm = harness_lm(prepare_for_decoding(model), tokenizer)
    found = lm.loglikelihood(instances("loglikelihood", pairs))
    for (logprob, greedy), (plain, plain_greedy) in zip(found, expected):
        assert logprob == pytest.approx(plain, abs=TOLERANCE)
        assert greedy == plain_greedy
    longer = sum(len(c) + len(a) > 97 for c, a in pairs)
    assert lm.cuts.truncated["toy"] == longer > 0
    assert lm.cuts.asked["toy"] == 200


@pytest.mark.parametrize("overlap", [0, 40])
def test_rolling_windows_cover_every_token_once(overlap, tokenizer):
    model = small_model("ultramem")
    texts = ["abc" * 30 + "d" * n for n in (0, 1, 7, 95, 200)] + ["x", ""]
    found = harness_lm(model, tokenizer, overlap=overlap).loglikelihood_rolling(
        instances("loglikelihood_rolling", [(text,) for text in texts])
    )
    for text, total in zip(texts, found):
        ids = [tokenizer.eos_id, *tokenizer.encode(text)]
        expected, begin = 0.0, 1
        while begin < len(ids):  # the first window is full, later ones read `overlap` again
            width = 96 if begin == 1 else 96 - overlap
            end = min(begin + width, len(ids))
            logprobs, targets = plain_logprobs(model, tokenizer, ids[:end])
            count = end - begin
            expected += float(logprobs[-count:].gather(1, targets[-count:, None]).sum())
            begin = end
        assert total == pytest.approx(expected, abs=TOLERANCE * max(1, len(ids) / 96))


@torch.no_grad()
def plain_answer(model, tokenizer, prompt, stops, max_new, max_length=96):
    ids = tokenizer.encode(prompt)[-(max_length - max_new) :]
    new = []
    for _ in range(max_new):
        logits = model.logits(torch.tensor([ids + new]))[0, -1, : tokenizer.vocab_size]
        new.append(int(logits.argmax()))
        if new[-1] == tokenizer.eos_id:
            return cut_at(tokenizer.decode(new[:-1]), stops)
        if any(stop in tokenizer.decode(new) for stop in stops):
            break
    return cut_at(tokenizer.decode(new), stops)


@pytest.mark.parametrize("kind", KINDS)
def test_generated_answers_are_the_plain_loops(kind, tokenizer):
    model = small_model(kind)
    prompts = [pair[0] for pair in random_pairs(60) if pair[0]][::3]
    # Stops that this model does produce: pieces of its own answers.
    free = plain_answer(model, tokenizer, prompts[0], [], 12)
    settings = {"until": [free[3:5], "zz"], "max_gen_toks": 12, "do_sample": False}
    expected = [plain_answer(model, tokenizer, p, settings["until"], 12) for p in prompts]
    lm = harness_lm(prepare_for_decoding(model), tokenizer)
    found = lm.generate_until(instances("generate_until", [(p, settings) for p in prompts]))
    assert found == expected
    assert free.startswith(found[0])
    assert len(found[0]) <= 3  # cut where the stop string began


def test_a_stop_string_ends_an_answer_across_token_boundaries(tokenizer):
    answer = Answer(tokenizer, [], ["</s>", "§"])
    text = "one </s"
    ended = [answer.push(token) for token in tokenizer.encode(text + ">two")]
    assert ended.index(True) == len(text)  # with the byte that completes it
    answer = Answer(tokenizer, [], ["</s>", "§"])
    assert [answer.push(token) for token in tokenizer.encode("a§")] == [False, False, True]
    assert answer.text() == "a"
    assert cut_at("a.b,c", [",", ".", ""]) == "a"


def test_unknown_generation_settings_are_refused(tokenizer):
    lm = harness_lm(small_model("dense"), tokenizer)
    with pytest.raises(ValueError, match="toy asks for generation settings .*: num_beams"):
        lm.generate_until(instances("generate_until", [("a", {"until": [], "num_beams": 3})]))


def test_the_vocabularys_padding_has_no_probability(tokenizer):
    model = small_model("dense")
    with torch.no_grad():
        model.head.weight[tokenizer.vocab_size :] = 100.0
    lm = harness_lm(model, tokenizer)
    logprobs = [lm.loglikelihood(instances("loglikelihood", [("a", "b")]))[0][0]]
    assert logprobs[0] == pytest.approx(plain_score(model, tokenizer, "a", "b")[0], abs=TOLERANCE)
    answer = lm.generate_until(instances("generate_until", [("a", {"max_gen_toks": 4})]))
    assert isinstance(answer[0], str)


def test_of_tokens_that_tie_the_first_is_the_most_likely(tokenizer):
    """As ``argmax`` has it: "b" and "c" have the same weights, and nothing scores above them."""
    model = small_model("dense")
    b, c = (tokenizer.encode(letter)[0] for letter in "bc")
    lm = harness_lm(model, tokenizer)
    pairs = [("a", "b"), ("a", "c")]
    with torch.no_grad():
        model.head.weight.mul_(0.1)
        x_D = model.hidden(torch.tensor([tokenizer.encode("a")]))[0][0, -1]
        model.head.weight[b] = model.head.weight[c] = x_D  # its product with itself is the largest
    found = lm.loglikelihood(instances("loglikelihood", pairs))
    assert found[0][0] == found[1][0]
    assert [greedy for _, greedy in found] == [b < c, c < b]
