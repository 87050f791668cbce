"""Four ranks that share tables and experts answer as one process does, whatever their shares."""

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from tests.harness_toys import (
    KINDS,
    byte_tokenizer,
    harness_lm,
    random_pairs,
    small_config,
    small_model,
)
from ultramem_ds.data.tokenizers import load_tokenizer
from ultramem_ds.infer.generate import generate
from ultramem_ds.infer.load import build_sharded_model
from ultramem_ds.infer.sampling import Sampling
from ultramem_ds.sharding.comm import Comm
from ultramem_ds.testing.distributed import run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.slow]

PARTITIONS = {"pkm": "number-wise", "ultramem": "owner-pooled"}
CPU = torch.device("cpu")


def sharded_model(kind, comm):
    """The small model of a kind, over the ranks of ``comm``."""
    whole = dict(small_model(kind).state_dict())
    partition = PARTITIONS.get(kind, "")
    model, held = build_sharded_model(small_config(kind), partition, comm, CPU, torch.float32)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name in held:
                block = held[name]
                rows = slice(block.first_row, block.first_row + block.num_rows)
                columns = slice(block.first_column, block.first_column + block.num_columns)
                value[: block.num_rows].copy_(whole[name][rows, columns])
            else:
                value.copy_(whole[name])
    model.mark_stale()
    return model.eval()


def ask(lm):
    """Results of 53 log-likelihoods and 5 answers: no multiple of the number of ranks."""
    pairs = random_pairs(53)
    settings = {"until": ["q"], "max_gen_toks": 9, "do_sample": False}
    prompts = [(pair[0], settings) for pair in pairs if pair[0]][::9]

    def instances(kind, arguments):
        return [Instance(kind, {}, args, 0, ("toy", i, 1)) for i, args in enumerate(arguments)]

    return (
        lm.loglikelihood(instances("loglikelihood", pairs)),
        lm.generate_until(instances("generate_until", prompts)),
        lm.loglikelihood_rolling(instances("loglikelihood_rolling", [("abc" * 70,)])),
    )


def body(rank, world_size, tokenizer_dir):
    """Both answers of each kind on rank 0; and a plain generation with an idle rank."""
    comm = Comm()
    tokenizer = load_tokenizer(tokenizer_dir)
    found = {}
    for kind in KINDS:
        lm = harness_lm(sharded_model(kind, comm), tokenizer, peers=comm)
        with lm.service.asking() as asks:
            if asks:
                found[kind] = (ask(lm), ask(harness_lm(small_model(kind), tokenizer)))
    mine = [[5, 6, 7]] if rank == 1 else []
    limits = {"eos_id": 0, "vocab_size": 257}
    sampling = Sampling(max_new_tokens=6, temperature=0)
    answer = generate(sharded_model("ultramem", comm), mine, sampling, **limits, peers=comm)
    return found, answer


def test_four_ranks_answer_as_one(tmp_path):
    byte_tokenizer(tmp_path)
    results = run_ranks(body, 4, tmp_path, timeout_s=500)
    for kind, ((scores, texts, rolled), (one_scores, one_texts, one_rolled)) in results[0][
        0
    ].items():
        assert texts == one_texts, kind
        # Whole rows come home and are added up there: the same sums. Pooled by their owners, and in
        # products with other ranks' tokens (MoE), sums have another order.
        exact = PARTITIONS.get(kind) == "number-wise" or kind == "dense"
        for (logprob, greedy), (one, one_greedy) in zip(scores, one_scores):
            assert logprob == pytest.approx(one, abs=0 if exact else 1e-4), kind
            assert greedy == one_greedy
        assert rolled == pytest.approx(one_rolled, abs=0 if exact else 1e-3)
    limits = {"eos_id": 0, "vocab_size": 257}
    alone = generate(small_model("ultramem"), [[5, 6, 7]], Sampling(max_new_tokens=6, temperature=0), **limits)  # fmt: skip
    assert [answer for _, answer in results] == [[], alone, [], []]
