"""How often the host waits for the device: one question per sharded lookup, none where no other
rank is asked, none in a decode step."""

import pytest
import torch

from tests.dist.test_sharding_lookup import SPEC, make_shard, rank_inputs
from ultramem_ds.config.load import load_config
from ultramem_ds.config.schema import MemoryConfig
from ultramem_ds.infer.cache import DecodeCache
from ultramem_ds.infer.prepare import prepare_for_decoding
from ultramem_ds.model.init import init_module
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.sharding.groups import make_groups
from ultramem_ds.sharding.lookup import build_lookup
from ultramem_ds.testing.distributed import run_ranks
from ultramem_ds.testing.host_syncs import count_host_syncs

SMALL = (
    "model.hidden_size=32 model.inner_size=64 model.seq_len=16 model.vocab_size=64 "
    "model.dropout=0 memory.knum=12 memory.value_dim=32 memory.top_m=4"
).split()
SHARDED = [("number-wise", False), ("number-wise", True), ("owner-pooled", False)]
SHARDED += [("dimension-wise", False)]


def lookups_of(rank, world_size):
    """What each scheme asks, forward and backward together."""
    asked = {}
    for scheme, dedup in SHARDED:
        groups = make_groups(world_size)
        memory = MemoryConfig(value_dim=SPEC.value_dim, num_cores=SPEC.num_cores, dedup=dedup)
        lookup = build_lookup(make_shard(groups, scheme), scheme, groups, memory)
        rows, projectors, scores, grad = rank_inputs("uniform", rank, world_size, 0)
        with count_host_syncs() as seen:
            pooled = lookup.start(rows, projectors, scores.requires_grad_()).wait()
            pooled.backward(grad)
        asked[scheme, dedup] = dict(seen)
    return asked


@pytest.mark.dist
def test_a_sharded_lookup_asks_once():
    for asked in run_ranks(lookups_of, 2):
        assert asked == dict.fromkeys(SHARDED, {"tolist": 1})


def test_a_training_step_asks_for_the_cores_alone_and_once():
    """The singular vectors of each memory layer, at the first micro-batch after an update."""
    config = load_config("ultramem-debug", SMALL)
    model = LanguageModel(config)
    init_module(model, config, seed=0)
    tokens = torch.randint(64, (2, 17))
    ids = (torch.arange(16) // 5).expand(2, 16)
    asked = []
    for _ in range(2):
        with count_host_syncs() as seen:
            terms = model(tokens, ids)
            (terms["loss"] + terms["aux_loss"]).backward()
        asked.append(dict(seen))
    num_layers = len(model.memory_layers)
    # The summed cores move to the CPU, where they are decomposed.
    assert asked == [{"cpu": num_layers, "_linalg_svd": num_layers}, {}]


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("kind", ["dense", "moe", "pkm", "ultramem"])
def test_a_decode_step_asks_nothing(kind, kernel, monkeypatch):
    monkeypatch.setenv("ULTRAMEM_KERNEL", kernel)
    config = load_config(f"{kind}-debug", [*SMALL, "memory.candidates=one-sided"])
    model = LanguageModel(config)
    init_module(model, config, seed=0)
    prepare_for_decoding(model)
    cache = DecodeCache(model, padding=[0, 3])
    with torch.no_grad():
        model.logits(torch.randint(64, (2, 7)), state=cache)
        with count_host_syncs() as seen:
            model.logits(torch.randint(64, (2, 1)), state=cache)
    assert dict(seen) == {}
