"""The whole model on the meta device, where a tensor left on the CPU meets others and fails, and
where nothing has a value: what asks for one, or for a size that depends on one, fails too."""

import pytest
import torch

from ultramem_ds.config.load import load_config
from ultramem_ds.infer.cache import DecodeCache
from ultramem_ds.infer.graphs import FixedStep
from ultramem_ds.infer.prepare import prepare_for_decoding
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.model.memory import scores
from ultramem_ds.model.memory.stats import StatsWindow
from ultramem_ds.sharding.scheme import Local
from ultramem_ds.sharding.shard import TableShard
from ultramem_ds.sharding.table_plan import TableSpec, shard_layout

SMALL = [
    *("model.hidden_size=32", "model.inner_size=64", "model.seq_len=16", "model.vocab_size=64"),
    *("memory.knum=12", "memory.value_dim=32", "memory.top_m=4"),
]
CASES = {
    "dense": ("dense-debug", []),
    "pkm": ("pkm-debug", []),
    "moe": ("moe-debug", []),
    "ultramem": ("ultramem-debug", []),
    "two-sided": ("ultramem-debug", ["memory.candidates=two-sided"]),
    "stored": ("ultramem-debug", ["memory.shuffle=stored", "memory.query=per-head"]),
}
META = torch.device("meta")


@pytest.fixture(autouse=True)
def cores_decomposed_elsewhere(monkeypatch):
    """The one visit to the CPU, once per optimizer step: the cores' singular vectors."""

    def decompose(form, total_Hrr):
        form._vectors_2Hrr = total_Hrr.new_empty(2, *total_Hrr.shape)
        form._current = form._core_version()
        form.directions = form.directions.to(total_Hrr.dtype)
        return form._vectors_2Hrr

    monkeypatch.setattr(scores.TuckerCore, "_decompose", decompose)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: self)


def meta_model(name, *, decode=False):
    preset, overrides = CASES[name]
    config = load_config(preset, [*SMALL, *overrides])
    with META:
        model = LanguageModel(config)
    # One process's loop over experts asks how many tokens each got; the grouped product does not.
    return prepare_for_decoding(model) if decode or name == "moe" else model


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_losses_and_statistics(name, dtype):
    if name == "moe" and dtype == torch.float32:
        pytest.skip("torch's grouped product has a meta form in bf16 only")
    model = meta_model(name).to(dtype).train()
    window = None
    if model.memory_layers:
        window = StatsWindow(model.config.memory, len(model.memory_layers), META)
        window.sample()
        for memory, layer in zip(model.memory_layers, window.layers):
            memory.observer = layer
    tokens = torch.zeros(2, 17, dtype=torch.int64, device=META)
    ids = torch.zeros(2, 16, dtype=torch.int64, device=META)
    for doc_ids in (None, ids):
        terms = model(tokens, doc_ids, vocab_limit=60)
        assert all(terms[key].is_meta and terms[key].ndim == 0 for key in list(terms)[:3])
        if name != "moe":  # prepared: without gradients of weights
            (terms["loss"] + terms["aux_loss"]).backward()
            missing = [n for n, p in model.named_parameters() if p.grad is None]
            assert missing == []
    if window is not None:
        assert all(tensor.is_meta for tensor in window.tensors())


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_decoding(name):
    model = meta_model(name, decode=True).bfloat16()
    cache = DecodeCache(model, padding=[0, 3])
    assert model.logits(torch.zeros(2, 7, dtype=torch.int64, device=META), state=cache).is_meta
    step = torch.zeros(2, 1, dtype=torch.int64, device=META)
    assert model.logits(step, state=cache).shape == (2, 1, 64)
    for kv in cache.kv:
        kv.reserve(kv.length + 1, kv.keys_BACK)
    fixed = FixedStep(model, cache)  # what a CUDA graph holds
    assert fixed.run().is_meta


def test_the_local_lookup_of_one_rank():
    """Its check of the row ids is the device's own; forward and backward."""
    spec = TableSpec(num_rows=20, value_dim=8, num_projectors=2, num_cores=2)
    values = torch.empty(160, device=META)

    class Comm:
        world_size = 1

        def global_rank(self, rank):
            return rank

    memory = load_config("ultramem-debug", []).memory
    shard = TableShard(spec, shard_layout(spec, "number-wise", 1, 0), lambda: values, Comm())
    rows = torch.zeros(3, 4, dtype=torch.int64, device=META)
    scores_TKh = torch.empty(3, 4, 2, device=META, requires_grad=True)
    pooled = Local(shard, Comm(), memory).run(rows, rows, scores_TKh)
    pooled.sum().backward()
    assert pooled.shape == (3, 2, 8) and scores_TKh.grad.is_meta and shard.grad_RV.is_meta
