"""Packed documents with boundaries respected give what each document gives alone, for all kinds."""

from __future__ import annotations

import pytest
import torch

from ultramem_ds.config.load import load_config
from ultramem_ds.model.init import init_module
from ultramem_ds.model.lm import LanguageModel

LENGTHS = (5, 1, 10)


# float64: attention sums in another order; selections are the same, so nothing jumps. The gate and
# the weighted sum of MoE are fp32 whatever the weights are.
TOLERANCES = {"dense": 1e-9, "pkm": 1e-9, "moe": 1e-5, "ultramem": 1e-9}


@pytest.mark.parametrize("kind", TOLERANCES)
def test_documents_do_not_see_each_other(kind: str) -> None:
    config = load_config(f"{kind}-debug", ["model.vocab_size=64"])
    model = LanguageModel(config).double()
    init_module(model, config, seed=1)
    model.eval()
    tokens = torch.randint(64, (2, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    begins, positions = [], []
    for length in LENGTHS:
        start = len(begins)
        begins += [start] * length
        positions += range(length)
    with torch.no_grad():
        packed = model.hidden(
            tokens, torch.tensor([begins, begins]), torch.tensor([positions, positions])
        )[0]
        alone = torch.cat([model.hidden(part)[0] for part in tokens.split(LENGTHS, dim=1)], dim=1)
        leaking = model.hidden(tokens)[0]
    torch.testing.assert_close(packed, alone, rtol=TOLERANCES[kind], atol=TOLERANCES[kind])
    assert (leaking - alone)[:, LENGTHS[0] :].abs().max() > 1e-3
