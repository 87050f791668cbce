"""Exports of small random models, and vLLM engines that serve them, in vLLM's own environment.

Run by ``make test-vllm``. An engine lives in this process: one import of vLLM serves them all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else two ranks want two NUMA nodes

import pytest

from tests.unit.exported_models import random_model, write_model
from ultramem_ds.exchange.directory import export_hf
from ultramem_ds.model.lm import LanguageModel

if TYPE_CHECKING:
    from vllm import LLM

# vLLM's attention on a CPU wants heads of 32; prompts of several cache blocks want long sequences.
SHAPES = ("model.hidden_size=64", "model.num_heads=2", "model.seq_len=256")
VARIANTS = {
    "dense": ("dense", ()),
    "pkm": ("pkm", ("memory.value_dim=64",)),
    "moe": ("moe", ()),
    "ultramem": ("ultramem", ()),
    "ultramem-no-conv": ("ultramem", ("memory.query_conv=0",)),
    "ultramem-other": ("ultramem-other", ()),
}
BLOCK_SIZE = 32  # tokens of a cache block
SHARD_BYTES = 40_000  # several files, and tables in several tensors


class Exported(NamedTuple):
    """A model as this program computes it, and its export."""

    model: LanguageModel
    directory: Path


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory):
    """``export(variant)``: each variant is made once."""
    made: dict[str, Exported] = {}

    def get(variant: str) -> Exported:
        if variant not in made:
            kind, overrides = VARIANTS[variant]
            model = random_model(kind, (*SHAPES, *overrides))
            root = tmp_path_factory.mktemp(variant)
            run_dir = write_model(model, root / "run")
            directory = export_hf(run_dir, root / "export", "fp32", SHARD_BYTES).directory
            made[variant] = Exported(model, directory)
        return made[variant]

    return get


@contextmanager
def engine(directory: Path, **changes: Any) -> Iterator[LLM]:
    """An engine in fp32 whose "logprobs" are raw logits, small enough to be under pressure.

    A batch holds 3 requests and a step 64 tokens: prompts are cut, and some wait for others.
    """
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings: dict[str, Any] = {
        "dtype": "float32",
        "block_size": BLOCK_SIZE,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 64,
        "kv_cache_memory_bytes": 64 << 20,
        "logprobs_mode": "raw_logits",
        "max_logprobs": -1,
        "prefix_cache_retention_interval": None,  # of the convolution: keep all blocks
        "disable_log_stats": False,
        **changes,
    }
    llm = LLM(str(directory), **settings)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
