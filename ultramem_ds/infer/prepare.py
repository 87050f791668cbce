"""A trained model turned into one that decodes fast: same weights, other modules."""

from __future__ import annotations

from torch import nn

from ultramem_ds.config.schema import MemoryConfig
from ultramem_ds.infer.attention import decode_attention
from ultramem_ds.infer.experts import GroupedExperts
from ultramem_ds.infer.search import PackedSelect
from ultramem_ds.infer.weights import PackedLinear, Packer, pack_where_possible
from ultramem_ds.kernels.native import native_library
from ultramem_ds.kernels.packed import can_pack
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.model.memory.layer import MemoryLayer
from ultramem_ds.model.moe import MixtureOfExperts
from ultramem_ds.model.transformer import Block
from ultramem_ds.sharding.experts import ShardedExperts


def prepare_for_decoding(
    model: LanguageModel, packer: Packer = pack_where_possible
) -> LanguageModel:
    """Replace, in place, what training wants by what decoding wants; returns the model.

    Mixtures of experts get grouped products, which read the chosen experts only. On a CPU in fp32,
    linear maps and experts get packed weights, and the memory selects in one native call
    (``kernels.packed``).

    Args:
        model: whose training ends here: its linear maps are emptied as they are taken over.
        packer: what becomes of linear maps.
    """
    model.requires_grad_(False).eval()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, MixtureOfExperts):
                setattr(module, name, GroupedExperts(child, packer))
    pack_linears(model, packer)
    install_native_calls(model)
    return model


def pack_linears(root: nn.Module, packer: Packer) -> None:
    """Exchange the linear maps below ``root`` for what ``packer`` makes of them, if anything."""
    for module in list(root.modules()):
        if isinstance(module, GroupedExperts | ShardedExperts):
            continue  # the gate's weight is read as it is, in fp32
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                weights = packer([child])
                if weights is not None:
                    setattr(module, name, PackedLinear(weights))


def install_native_calls(model: LanguageModel) -> None:
    """Attend to the cache, and select in memory layers, in native calls where that is possible."""
    for block in model.blocks:
        assert isinstance(block, Block)
        if can_pack(model.embedding.weight):
            block.attention.attend = decode_attention
    for memory in model.memory_layers:
        select_natively(memory, model.config.memory)


def select_natively(layer: MemoryLayer, memory: MemoryConfig) -> None:
    """Select in one native call, where its candidates, dtype and device allow it."""
    keys = layer.retrieval.keys.weight
    if memory.candidates == "one-sided" and can_pack(keys) and native_library(keys) is not None:
        layer.retrieval.select = PackedSelect(memory)
