"""How experts are spread over ranks."""

from __future__ import annotations

from ultramem_ds.config.schema import Config


def expert_parallel_size(config: Config, world_size: int) -> int:
    """Ranks that share one set of experts.

    Raises:
        ValueError: if it does not divide the experts or the world, naming sizes that do.
    """
    moe = config.moe
    size = moe.expert_parallel_size or world_size
    if moe.num_experts % size == 0 and world_size % size == 0:
        return size
    fits = [s for s in range(1, world_size + 1) if world_size % s == 0 and moe.num_experts % s == 0]
    raise ValueError(
        f"{moe.num_experts} experts cannot be spread over an expert-parallel group of {size} of "
        f"{world_size} ranks; set moe.expert_parallel_size to one of {fits}"
    )
