"""The tensors of an export (``docs/export.md``) into the served model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TypeAlias

from torch import Tensor, nn
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from ultramem_ds.model.memory.expansion import BijectionShuffle, StoredShuffle
from ultramem_ds.model.memory.layer import MemoryLayer
from ultramem_ds.model.memory.scores import TuckerCore
from ultramem_ds.vllm.memory import RowShardedTable

Take: TypeAlias = Callable[[Tensor], None]  # puts one tensor of the export where it belongs


def load_tensors(takers: dict[str, Take], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Hand every tensor to its taker.

    Raises:
        ValueError: if a tensor has no taker, or a taker gets no tensor.
    """
    missing = set(takers)
    for name, tensor in tensors:
        if name not in takers:
            raise ValueError(f"the export holds {name}, which config.json has no place for")
        takers[name](tensor)
        missing.discard(name)
    if missing:
        raise ValueError(f"the export lacks {', '.join(sorted(missing)[:5])}")


def parameter_takers(module: nn.Module, prefix: str = "") -> dict[str, Take]:
    """Who takes the parameters of ``module``, tables apart; vLLM's layers cut them over ranks."""
    return {
        prefix + name: partial(getattr(param, "weight_loader", default_weight_loader), param)
        for name, param in module.named_parameters()
        if not hasattr(param, "table_index")
    }


def memory_takers(layer: MemoryLayer, num_parts: int) -> Iterator[tuple[str, Take]]:
    """Who takes what a memory layer has besides plain parameters; names without its prefix.

    Args:
        layer: with a :class:`RowShardedTable`.
        num_parts: tensors that its table is cut into, ``memory_table_parts``.
    """
    table = layer.values
    assert isinstance(table, RowShardedTable)
    rows_per_part = -(-table.num_rows // num_parts)
    for part in range(num_parts):
        name = "values.weight" if num_parts == 1 else f"values.part_{part}.weight"
        yield name, partial(table.take, first_row=part * rows_per_part)
    if isinstance(layer.retrieval.form, TuckerCore):
        yield "retrieval.form.directions", partial(_take_directions, layer.retrieval.form)
    if isinstance(layer.shuffle, BijectionShuffle):
        yield "shuffle.rounds", layer.shuffle.take
    if isinstance(layer.shuffle, StoredShuffle):
        yield "shuffle.index", partial(default_weight_loader, layer.shuffle.index)


def _take_directions(form: TuckerCore, directions_2Hr: Tensor) -> None:
    """They stay fp32, whatever the rest is served in."""
    form.directions = directions_2Hr.to(form.core.device)
