"""A trained model turned into one that decodes fast: same weights, other modules."""

from __future__ import annotations

from torch import Tensor, nn

from ultramem_ds.infer.experts import GroupedExperts
from ultramem_ds.infer.find import can_fuse, fuse_retrieval
from ultramem_ds.infer.search import PackedSearch
from ultramem_ds.infer.weights import GroupedWeights, PackedLinear, Packer
from ultramem_ds.kernels import resolve
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.model.memory.layer import MemoryLayer
from ultramem_ds.model.moe import MixtureOfExperts
from ultramem_ds.sharding.experts import ShardedExperts


def prepare_for_decoding(
    model: LanguageModel, packer: Packer = GroupedWeights.pack, like: Tensor | None = None
) -> LanguageModel:
    """Replace, in place, what training wants by what decoding wants; returns the model.

    Mixtures of experts get grouped products, which read the chosen experts only. Where the device's
    kernel gains by it (``Kernel.packs``: fp32 on a CPU), linear maps and the memory's search keys
    are packed too. Where it fuses a memory layer's retrieval (``Kernel.finds_rows``: Triton), that
    is what decode steps take.

    Args:
        model: whose training ends here: its linear maps are emptied as they are taken over.
        packer: what becomes of linear maps.
        like: a weight as the model will have them, for a model that has no memory yet.
    """
    like = model.embedding.weight if like is None else like
    model.requires_grad_(False).eval()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, MixtureOfExperts):
                setattr(module, name, GroupedExperts(child, packer))
    if gains_by_packing(like):
        pack_linears(model, packer)
        for memory in model.memory_layers:
            search_packed_keys(memory)
        return model
    for memory in model.memory_layers:
        if can_fuse(memory, like):
            fuse_retrieval(memory)
    return model


def gains_by_packing(weight: Tensor) -> bool:
    """Whether products of few rows with weights like this one are faster packed."""
    return resolve("auto", weight.device).packs(weight)


def pack_linears(root: nn.Module, packer: Packer = GroupedWeights.pack) -> None:
    """Exchange the linear maps below ``root`` for what ``packer`` makes of them."""
    for module in list(root.modules()):
        if isinstance(module, GroupedExperts | ShardedExperts):
            continue  # the gate's weight is read as it is, in fp32
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(packer([child])))


def search_packed_keys(layer: MemoryLayer) -> None:
    """Let a memory layer search packed keys."""
    layer.retrieval.product = PackedSearch(layer.retrieval.layout)
