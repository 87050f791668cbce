"""Presets as data: Tables 2, 4, 5 and 6 of the paper, and CPU-sized debug models.

The parts are in ``config/shapes.py``, the ablations in ``config/ablations.py``, the tuned families
in ``config/tuned.py``. Table 6's two misprints are corrected:
UltraMem-151M-x10 has knum 1000 and PKM-1.6B-x12 knum 3077 (docs/memory-layer.md).
"""

from __future__ import annotations

import difflib

from ultramem_ds.config.ablations import ablations
from ultramem_ds.config.schema import (
    Config,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    TrainConfig,
)
from ultramem_ds.config.shapes import (
    DEBUG,
    SIZE_1_6B,
    SIZE_6_5B,
    SIZE_151M,
    SIZE_680M,
    SPANS_1_6B,
    SPANS_151M,
    SPANS_680M,
    Overrides,
    merge,
    moe,
    pkm,
    ultramem,
)
from ultramem_ds.config.tuned import tuned

_SECTIONS = {
    "model": ModelConfig,
    "memory": MemoryConfig,
    "moe": MoEConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
    "data": DataConfig,
}


_DATA: dict[str, Overrides] = {
    "dense-151m": SIZE_151M,
    "dense-680m": SIZE_680M,
    "dense-1.6b": SIZE_1_6B,
    "dense-6.5b": SIZE_6_5B,
    "moe-151m-2in32": merge(SIZE_151M, moe(2528, 32)),
    "moe-680m-2in33": merge(SIZE_680M, moe(3584, 33)),
    "moe-1.6b-2in34": merge(SIZE_1_6B, moe(4672, 34)),
    "ultramem-151m-x10": merge(SIZE_151M, ultramem(SPANS_151M, 16, 256, 1000, 512)),
    "ultramem-151m-x12": merge(SIZE_151M, ultramem(SPANS_151M, 16, 256, 1100, 512)),
    "ultramem-680m-x12": merge(SIZE_680M, ultramem(SPANS_680M, 35, 384, 1632, 768)),
    "ultramem-1.6b-x12": merge(SIZE_1_6B, ultramem(SPANS_1_6B, 42, 448, 1792, 1024)),
    "pkm-151m-x12": merge(SIZE_151M, pkm("6:6", 16, 6, 512, 1347, 1024)),
    "pkm-680m-x12": merge(SIZE_680M, pkm("12:12", 35, 8, 768, 2308, 1536)),
    "pkm-1.6b-x12": merge(SIZE_1_6B, pkm("16:16", 42, 12, 896, 3077, 2048)),
    **ablations(),
    "dense-debug": DEBUG,
    "pkm-debug": merge(DEBUG, pkm("3:3", 8, 4, 64, 192, 128)),
    "moe-debug": merge(DEBUG, moe(336, 16)),
    "ultramem-debug": merge(DEBUG, ultramem("1:2/3:4", 8, 16, 192, 64)),
}
_DATA |= tuned(_DATA)

PRESETS: tuple[str, ...] = tuple(_DATA)


def preset(name: str) -> Config:
    """Build the configuration of the preset ``name``.

    Args:
        name: One of ``PRESETS``.

    Returns:
        The full configuration, every default filled in.

    Raises:
        ValueError: ``name`` is no preset; the message names the nearest one.
    """
    if name not in _DATA:
        nearest = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)
        raise ValueError(f"unknown preset {name!r}: did you mean {nearest[0]!r}? See `count`.")
    data = _DATA[name]
    sections = {key: cls(**data.get(key, {})) for key, cls in _SECTIONS.items()}
    return Config(preset=name, **sections)
