"""What starting a process costs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

ENGINE_IMPORTS = """
import sys
from ultramem_ds.zero.deepspeed_import import deepspeed
import deepspeed.runtime.engine
import deepspeed.runtime.zero.muon.muon_optimizer
print("torch._inductor.compile_fx" in sys.modules)
"""


def test_an_engine_does_not_load_the_compiler() -> None:
    """DeepSpeed's Muon optimizer, imported by its check of any optimizer, would."""
    found = subprocess.run([sys.executable, "-c", ENGINE_IMPORTS], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == "False"


STEP = """
import sys, torch
from tests.dist.elastic_series import KINDS
from ultramem_ds.config.deepspeed import load_deepspeed_json
from ultramem_ds.config.load import load_config
from ultramem_ds.data.micro_batch import MicroBatch
from ultramem_ds.planning.batches import plan_batches
from ultramem_ds.telemetry.phases import Phases
from ultramem_ds.train.engine import TrainEngine
from ultramem_ds.zero.runtime import runtime
preset, *sizes = KINDS[sys.argv[1]]
config = load_config(preset, sizes)
with runtime() as ranks:
    json = load_deepspeed_json(None, config.model.kind)
    engine = TrainEngine(config, ranks, json, plan_batches(config, 1), Phases())
    tokens = torch.zeros(2, config.model.seq_len + 1, dtype=torch.int64)
    engine.train_step(iter([MicroBatch(tokens, ())] * 4), 0)
print([m for m in ("torch._dynamo", "torch._inductor", "triton") if m in sys.modules])
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs Triton kernels")
@pytest.mark.parametrize("kind", ["dense", "moe", "ultramem"])
def test_training_loads_neither_compiler_nor_triton(kind: str) -> None:
    """ZeRO-1, 2 and 3; together they would be a third of a small model's memory."""
    found = subprocess.run([sys.executable, "-c", STEP, kind], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == "[]"
