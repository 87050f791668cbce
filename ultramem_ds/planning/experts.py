"""How experts are spread over ranks."""

from __future__ import annotations

from dataclasses import dataclass

from ultramem_ds.config.schema import Config


@dataclass(frozen=True)
class ExpertLayout:
    """Every rank of a group holds equally many experts; padding makes the last ranks' full.

    Attributes:
        num_experts: X, of the model.
        group_size: ranks that share one set of experts.
    """

    num_experts: int
    group_size: int

    @property
    def slots_per_rank(self) -> int:
        """Experts that one rank holds, padding included."""
        return -(-self.num_experts // self.group_size)

    @property
    def num_slots(self) -> int:
        """Experts of one group, padding included."""
        return self.slots_per_rank * self.group_size

    @property
    def padding(self) -> int:
        """Slots without an expert, the last ones."""
        return self.num_slots - self.num_experts

    def first_expert(self, rank: int) -> int:
        """Global index of a rank's first slot; from X on slots are padding."""
        return rank % self.group_size * self.slots_per_rank


def expert_layout(config: Config, world_size: int) -> ExpertLayout:
    """The layout that ``moe.expert_parallel_size`` asks for.

    0 is the smallest group in which a rank holds as few experts as it can on ``world_size`` ranks:
    34 experts on 8 ranks lie in one group, 5 on a rank; 32 on 64 ranks in two, 1 on a rank.

    Raises:
        ValueError: if the size does not divide the ranks, naming sizes that do.
    """
    moe = config.moe
    sizes = [size for size in range(1, world_size + 1) if world_size % size == 0]
    if not moe.expert_parallel_size:
        layouts = [ExpertLayout(moe.num_experts, size) for size in sizes]
        return min(layouts, key=lambda layout: (layout.slots_per_rank, layout.group_size))
    if moe.expert_parallel_size not in sizes:
        raise ValueError(
            f"moe.expert_parallel_size={moe.expert_parallel_size} does not divide the "
            f"{world_size} ranks; use one of {sizes}"
        )
    return ExpertLayout(moe.num_experts, moe.expert_parallel_size)
