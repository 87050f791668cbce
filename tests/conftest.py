"""Fixtures shared by all tests: a small prepared corpus of real text."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from tests.dist.launching import ROOT, run_verb
from ultramem_ds.data.prepare import PrepareConfig, prepare
from ultramem_ds.data.tokenizer_training import train_on_inputs

torch.set_num_threads(1)

# What tests compile is compiled faster, and apart from what other programs of this user have.
if shutil.which("c++"):
    os.environ.setdefault("CXX", str(Path(__file__).with_name("cxx_without_debug_info.sh")))
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / "build" / "test-extensions"))

VOCAB_SIZE = 512

# Of `trained`: two steps of a small UltraMem model on one rank.
RUN_OVERRIDES = (
    "model.hidden_size=32 model.inner_size=64 model.seq_len=32 train.global_batch_size=4 "
    f"model.vocab_size={VOCAB_SIZE} train.micro_batch_size=2 train.max_steps=4 memory.knum=10 "
    "memory.top_m=4 memory.kdim=8 train.eval_sequences=2"
).split()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python's documentation topics, two subsets, tokenized; with validation splits."""
    root = tmp_path_factory.mktemp("corpus")
    texts = sorted(topics.items())
    for subset, part in (("even", texts[::2]), ("odd", texts[1::2])):
        lines = [json.dumps({"text": text, "meta": {"source": name}}) + "\n" for name, text in part]
        (root / subset).mkdir()
        (root / subset / f"{subset}.jsonl").write_text("".join(lines))
    train_on_inputs([root], root / "tokenizer.json", vocab_size=VOCAB_SIZE)
    prepare(
        [root / "even", root / "odd"],
        root / "data",
        root / "tokenizer.json",
        PrepareConfig(workers=1, validation_share=0.1),
    )
    return root / "data"


@pytest.fixture(scope="session")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with one checkpoint."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    result = run_verb(
        "train", "--preset", "ultramem-debug", "--data", str(prepared), "--run-dir", str(run_dir),
        *RUN_OVERRIDES, "train.stop_at_step=2",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return run_dir
