"""Everything that knows DeepSpeed: the engine, tables under ZeRO-3, experts, offload, the gate.

No other package imports DeepSpeed (``scripts/check_arrows.py``). What is used beyond its documented
interface is listed in :mod:`ultramem_ds.zero.pinned` and checked here.
"""

from ultramem_ds.zero.pinned import check_names

check_names()
