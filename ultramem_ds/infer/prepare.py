"""A trained model turned into one that decodes fast: same weights, other modules."""

from __future__ import annotations

from ultramem_ds.infer.experts import GroupedExperts
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.model.moe import MixtureOfExperts


def prepare_for_decoding(model: LanguageModel) -> LanguageModel:
    """Replace, in place, what training wants by what decoding wants; returns the model.

    Mixtures of experts get stacked weights, of which a step reads the chosen experts only.
    """
    for block in model.blocks:
        if isinstance(block.mlp, MixtureOfExperts):
            block.mlp = GroupedExperts(block.mlp)
    return model.requires_grad_(False).eval()
