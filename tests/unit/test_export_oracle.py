"""transformers' model of an export against its files computed in fp64 by other code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the extra hf is not installed")
from transformers import AutoModelForCausalLM

import ultramem_ds.hf  # noqa: F401 - registers the model family
from tests.unit.export_oracle import ExportOracle
from tests.unit.exported_models import KINDS, prompts_of, random_model, write_model
from ultramem_ds.exchange.directory import export_hf


@pytest.mark.parametrize("max_shard_bytes", [10**9, 4000])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_files(kind: str, max_shard_bytes: int, tmp_path: Path) -> None:
    """One file with whole tables, and tables in parts over many files."""
    model = random_model(kind)
    export_hf(write_model(model, tmp_path / "run"), tmp_path / "export", "fp32", max_shard_bytes)
    oracle = ExportOracle(tmp_path / "export")
    if max_shard_bytes == 4000:
        assert len(list((tmp_path / "export").glob("*.safetensors"))) > 1
        assert oracle.config.get("memory_table_parts", 1) > 1 or kind in ("dense", "moe")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    for prompt in prompts_of(1, 9, 20):
        expected = oracle.logits(prompt)
        ids = torch.tensor([prompt])
        with torch.no_grad():
            found = {"ours": model.logits(ids)[0], "transformers": theirs(ids).logits[0]}
        for name, logits in found.items():
            # fp32 against fp64 through four blocks: within 1e-5 of the largest logit.
            error = float((logits.double() - expected).abs().max())
            assert error <= 1e-5 * float(expected.abs().max()), name
