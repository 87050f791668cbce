"""Paper-sized ablation presets at debug scale: what a row switches stays, its sizes shrink."""

from __future__ import annotations

from ultramem_ds.config.load import load_config, to_dict

WIDTH = 8  # divides hidden size, value width and kdim
KNUM = 1000 / 160  # divides knum
SPANS = {"6:6": "2:2", "3:5/6:8/9:11": "1:2/2:3/3:4", "4:4/7:7/10:10": "2:2/3:3/4:4"}


def debug_scale(preset: str) -> tuple[str, ...]:
    """Overrides that bring a 151M memory preset to the shape of the debug presets.

    Raises:
        ValueError: if the preset has no memory layer, or another placement than 151M's.
    """
    config = load_config(preset)
    memory = config.memory
    if not config.has_memory or memory.placement not in SPANS:
        raise ValueError(f"preset {preset!r} has no debug scale: shape=debug is for 151M memories")
    small = to_dict(load_config("ultramem-debug"))
    overrides = [f"model.{key}={value}" for key, value in small["model"].items() if key != "kind"]
    overrides += [
        f"memory.placement={SPANS[memory.placement]}",
        f"memory.knum={round(memory.knum / KNUM)}",
        f"memory.kdim={memory.kdim // WIDTH}",
        f"memory.value_dim={memory.value_dim // WIDTH}",
        f"optim.lr={small['optim']['lr']}",
        f"optim.value_lr={small['optim']['value_lr']}",
        "train.global_batch_size=16",
        "train.precision=fp32",
    ]
    return tuple(overrides)
