"""Fixtures shared by all tests: a small prepared corpus of real text."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from ultramem_ds.data.prepare import PrepareConfig, prepare
from ultramem_ds.data.tokenizer_training import train_on_inputs

torch.set_num_threads(1)

VOCAB_SIZE = 512


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
