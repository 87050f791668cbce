"""vLLM computes what we compute: logits and continuations, for every kind, in any batch."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
from vllm import LLM, RequestOutput, SamplingParams
from vllm.inputs import TokensPrompt

from tests.unit.exported_models import ENTRIES, greedy, prompts_of
from tests.vllm.conftest import VARIANTS, engine
from ultramem_ds.model.lm import LanguageModel

LENGTHS = (130, 120, 100, 1, 17)
# fp32 sums in another order: 6e-7 of the largest logit was seen.
TOLERANCE = 1e-5
COUNT = 64
# Blocks of the cache that 3 long requests overflow, so that one is preempted and computed again.
# Models with a convolution have more cache groups, of which each request holds blocks.
NUM_BLOCKS = {"ultramem": 28, "ultramem-other": 28}


class Served(NamedTuple):
    """An engine and the model it serves."""

    llm: LLM
    model: LanguageModel


@pytest.fixture(scope="module", params=VARIANTS)
def served(request: pytest.FixtureRequest, export):
    exported = export(request.param)
    blocks = NUM_BLOCKS.get(request.param, 14)
    with engine(exported.directory, num_gpu_blocks_override=blocks) as llm:
        yield Served(llm, exported.model)


def greedy_params(**changes) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=COUNT, detokenize=False, **changes)


def as_prompts(prompts: list[list[int]]) -> list[TokensPrompt]:
    return [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]


def continuation(output: RequestOutput) -> list[int]:
    """The new tokens, without the end of text."""
    tokens = list(output.outputs[0].token_ids)
    return tokens[:-1] if tokens and tokens[-1] == 0 else tokens


def prompt_logits(output: RequestOutput, width: int) -> Tensor:
    """Logits that predict the second to the last token of a prompt."""
    rows = []
    for by_token in output.prompt_logprobs[1:]:
        row = torch.full((width,), torch.nan)
        row[list(by_token)] = torch.tensor([entry.logprob for entry in by_token.values()])
        rows.append(row)
    return torch.stack(rows)


def check_logits(llm: LLM, model: LanguageModel) -> None:
    prompts = prompts_of(2, 40, 13)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, detokenize=False)
    for prompt, output in zip(prompts, llm.generate(as_prompts(prompts), params, use_tqdm=False)):
        with torch.no_grad():
            ours = model.logits(torch.tensor([prompt]))[0, :-1]
        theirs = prompt_logits(output, ours.shape[1])
        assert (theirs[:, ENTRIES:] == -torch.inf).all()
        error = (theirs - ours)[:, :ENTRIES].abs().max() / ours[:, :ENTRIES].abs().max()
        assert error < TOLERANCE


def test_logits(served: Served):
    check_logits(*served)


def test_continuations_of_a_batch_that_is_too_large(served: Served):
    """More requests than fit: they wait, are cut into chunks, preempted and computed again."""
    prompts = prompts_of(*LENGTHS)
    outputs = served.llm.generate(as_prompts(prompts), greedy_params(), use_tqdm=False)
    expected = greedy(served.model, prompts, COUNT)
    assert [continuation(output) for output in outputs] == expected
    assert sum(map(len, expected)) > 2 * COUNT  # the end of text did not end them all
    counters = {metric.name: metric for metric in served.llm.get_metrics()}
    assert counters["vllm:num_preemptions"].value > 0


def test_requests_join_and_leave(served: Served):
    """A request decodes on while another joins it and a third one is aborted half-way."""
    engine_ = served.llm.llm_engine
    first, second, third = prompts_of(9, 33, 21)
    done: dict[str, list[int]] = {}
    engine_.add_request("first", as_prompts([first])[0], greedy_params())
    for step in range(4 * COUNT):
        if step == 5:
            engine_.add_request("second", as_prompts([second])[0], greedy_params())
            engine_.add_request("third", as_prompts([third])[0], greedy_params())
        if step == 15:
            engine_.abort_request(["third"])
        for output in engine_.step():
            if output.finished:
                done[output.request_id] = continuation(output)
        if step > 15 and not engine_.has_unfinished_requests():
            break
    expected = greedy(served.model, [first, second], COUNT)
    assert [done["first"], done["second"]] == expected


def test_shared_prefix(served: Served):
    """The second request takes cached blocks of the first, convolution inputs included."""
    shared = prompts_of(131)[0]
    prompts = [shared, shared[:100] + prompts_of(9)[0]]
    expected = greedy(served.model, prompts, COUNT)
    served.llm.reset_prefix_cache()
    for prompt, ours, cached in zip(prompts, expected, (0, 96)):
        output = served.llm.generate(as_prompts([prompt]), greedy_params(), use_tqdm=False)[0]
        assert continuation(output) == ours
        assert output.num_cached_tokens == cached


@pytest.mark.parametrize("variant", ["moe", "ultramem"])
def test_two_ranks(export, variant: str):
    """Heads, inner widths, vocabulary and table rows over two processes."""
    exported = export(variant)
    prompts = prompts_of(*LENGTHS)
    with engine(exported.directory, tensor_parallel_size=2) as llm:
        check_logits(llm, exported.model)
        outputs = llm.generate(as_prompts(prompts), greedy_params(), use_tqdm=False)
    expected = greedy(exported.model, prompts, COUNT)
    assert [continuation(output) for output in outputs] == expected
