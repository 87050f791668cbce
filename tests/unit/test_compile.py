"""``train.compile``: one whole graph for all blocks of a shape, and the same losses.

Traced and differentiated as for inductor, but run by torch's own operators: generating code takes
minutes. ``tests/dist/test_series.py`` has it under DeepSpeed.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from ultramem_ds.config.load import load_config
from ultramem_ds.model.compiling import compile_blocks
from ultramem_ds.model.init import init_module
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.model.recompute import recompute_blocks

SMALL = [
    *("model.hidden_size=32", "model.inner_size=64", "model.vocab_size=64", "model.seq_len=16"),
    *("model.dropout=0.0", "model.num_layers=4"),
]
MEMORY = ["memory.knum=12", "memory.value_dim=16", "memory.top_m=4"]


def make(name):
    memory = MEMORY if name == "ultramem-debug" else []
    config = load_config(name, [*SMALL, *memory])
    model = LanguageModel(config).train()
    init_module(model, config, seed=0)
    return model


def series(model, documents):
    tokens = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        terms = model(tokens, documents)
        total = terms["loss"] + terms["aux_loss"] + terms["balance_loss"]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        model.mark_stale()
        losses.append(float(total.detach()))
    return losses


@pytest.mark.parametrize("name", ["dense-debug", "ultramem-debug", "moe-debug"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_blocks_of_one_shape_are_one_graph_and_give_the_same_losses(name, recompute):
    documents = torch.tensor([[0] * 7 + [1] * 9] * 2) if recompute else None
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = make(name)
    compile_blocks(model, backend=counter)
    if recompute:
        recompute_blocks(model)
    losses = series(model, documents)
    # The same operators on the same numbers but for decomposed ones: 2^-24 each, three steps.
    assert losses == pytest.approx(series(make(name), documents), rel=1e-5)
    assert losses[-1] < losses[0]
    assert counter.frame_count == 1
    with torch.no_grad():  # of another shape: blocks run as they are
        model(torch.zeros(3, 9, dtype=torch.int64))
    assert counter.frame_count == 1
