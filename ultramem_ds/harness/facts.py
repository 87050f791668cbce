"""How a result came about: what else one needs to get it again."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch

from ultramem_ds import __version__
from ultramem_ds.harness.evaluation import SEEDS
from ultramem_ds.harness.lm import HarnessLM
from ultramem_ds.harness.tasks import TaskSet

_PACKAGES = ("lm_eval", "torch", "datasets", "tokenizers", "numpy")


def versions() -> dict[str, str]:
    """Of everything that a result depends on."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"ultramem_ds": __version__, **found}


def describe(lm: HarnessLM, tasks: TaskSet, *, limit: int | None, **model: Any) -> dict[str, Any]:
    """Facts about the evaluation of one model.

    Args:
        lm: after the evaluation.
        tasks: that were evaluated.
        limit: items of each task; None = all.
        model: further facts, about the model.
    """
    tokenizer = lm.service.tokenizer
    cuts = lm.cuts
    return {
        **model,
        "ranks": lm.service.peers.world_size,
        "max_length": lm.max_length,
        "window_overlap": lm.overlap,
        "max_tokens_per_forward": lm.service.max_tokens,
        "prefix_token": {
            "id": lm.prefix_token_id,
            "text": tokenizer.decode([lm.prefix_token_id], skip_special=False),
        },
        "tokenizer_sha256": tokenizer.hash,
        "limit": limit,
        "seeds": SEEDS,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "requests": {
            task: {
                "asked": asked,
                "truncated": cuts.truncated[task],
                "shortened": cuts.shortened[task],
            }
            for task, asked in cuts.asked.items()
        },
        "local_data": {
            task: {split: str(path) for split, path in data.files.items()}
            for task, data in tasks.local.items()
        },
        "local_data_lacks": {task: data.notes for task, data in tasks.local.items() if data.notes},
    }
