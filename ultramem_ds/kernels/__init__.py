"""Sparse lookup, weighting and pooling: ``lookup_reduce`` and ``bag_reduce`` (docs/kernels.md)."""

from ultramem_ds.kernels.base import RowGradients
from ultramem_ds.kernels.ops import (
    bag_reduce,
    bag_reduce_backward_rows,
    lookup_reduce,
    lookup_reduce_backward_rows,
    row_adam_,
)
from ultramem_ds.kernels.registry import describe

__all__ = [
    "RowGradients",
    "bag_reduce",
    "bag_reduce_backward_rows",
    "describe",
    "lookup_reduce",
    "lookup_reduce_backward_rows",
    "row_adam_",
]
