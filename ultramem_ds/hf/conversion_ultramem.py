"""From the tensors of an exported directory to the modules' parameters, and back in saving."""

from __future__ import annotations

from typing import Any

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)

from ultramem_ds.hf.configuration_ultramem import UltraMemConfig


class TableParts(Concatenate):
    """Joins a table's parts in loading; a table that is one part stays the tensor it is."""

    def __init__(self) -> None:
        super().__init__(dim=0, num_shards_attribute="memory_table_parts")

    @property
    def reverse_op(self) -> CutTable:
        """What saving does."""
        return CutTable()


class CutTable(ConversionOps):
    """Cuts a table into ``config.memory_table_parts`` runs of rows in saving."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Parts by name; the whole table under its own name if that is one."""
        (found,) = input_dict.values()
        table_NV = found[0] if isinstance(found, list) else found
        num_parts = kwargs["config"].memory_table_parts
        if num_parts == 1:
            name = kwargs["full_layer_name"].replace(target_patterns[0], source_patterns[0])
            return {name: table_NV}
        rows = -(-len(table_NV) // num_parts)
        parts = table_NV.split(rows)
        return {target_patterns[0].replace("*", str(p)): part for p, part in enumerate(parts)}

    @property
    def reverse_op(self) -> TableParts:
        """What loading does."""
        return TableParts()


def register_conversion() -> None:
    """Tell transformers how stored tensors and parameters correspond."""
    conversions: list[WeightConverter | WeightRenaming] = [
        WeightConverter("values.part_*.weight", "values.weight", [TableParts()]),
        WeightConverter(
            "mlp.experts.*.up_proj.weight", "mlp.experts.up_proj", [MergeModulelist(dim=0)]
        ),
        WeightConverter(
            "mlp.experts.*.down_proj.weight", "mlp.experts.down_proj", [MergeModulelist(dim=0)]
        ),
    ]
    register_checkpoint_conversion_mapping(UltraMemConfig.model_type, conversions, overwrite=True)
