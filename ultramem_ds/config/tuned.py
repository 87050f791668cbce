"""The best recipe found for every kind, as presets beside the paper's own (docs/study.md).

Each differs from its plain preset in what is written here and in nothing else. The evidence is that
of the study ``rates-demo``: the demo's corpus, 1,500 steps of 2,048 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

from ultramem_ds.config.shapes import Overrides, merge

_DEBUG_TUNED: dict[str, Overrides] = {
    "dense-debug": {"optim": {"lr": 4e-3}},
    "pkm-debug": {"optim": {"lr": 4e-3}},
    "moe-debug": {"optim": {"lr": 4e-3}},
    "ultramem-debug": {"memory": {"init": "corrected"}, "optim": {"lr": 4e-3}},
}


def tuned(presets: Mapping[str, Overrides]) -> dict[str, Overrides]:
    """``NAME-tuned`` for every preset that has a recipe."""
    return {f"{name}-tuned": merge(presets[name], recipe) for name, recipe in _DEBUG_TUNED.items()}
