"""Operators of the memory layer and of decoding, each in several kernels (docs/kernels.md)."""

from ultramem_ds.kernels.ops import bag_reduce, lookup_reduce, row_adam_
from ultramem_ds.kernels.registry import describe, resolve

__all__ = ["bag_reduce", "describe", "lookup_reduce", "resolve", "row_adam_"]
