"""Training-state statistics of one memory layer (paper Figure 10 and more).

Phases: while training, a ``MemoryLayer`` shows its observer every forward, which only adds to usage
counts. The first forward after ``StatsWindow.sample`` also records moments and recall. At the end
of a window the caller sums ``StatsWindow.tensors`` over ranks, ``summaries`` turns the sums into
numbers and ``reset`` begins the next window. Nothing here knows of ranks, and nothing reaches the
host before ``summaries``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ultramem_ds.config.schema import MemoryConfig
from ultramem_ds.model.memory.retrieval import Selection

# T tokens, H heads, K = m*H rows per token, h cores, m top-m, r Tucker rank, N physical rows.

MAX_BUCKETS = 1 << 20  # usage counts per id space: 8 MiB
RECALL_TOKENS = 4  # per sampled forward; the exhaustive search of each costs H * n^2

_MOMENTS = (
    "forwards",
    "searches",  # tokens times heads
    "top1_score",
    "last_score",
    "output_count",
    "output_sum",
    "output_square",
    "residual_count",
    "residual_square",
    "aux_loss",
    "recall",
)


class UsageCounter:
    """Counts how often each of ``num_ids`` ids occurred, in at most ``MAX_BUCKETS`` buckets.

    In 64 bits: where a layer collapses, one id is meant by every token of a window on all ranks.

    Ids share buckets (by remainder) where there are more ids than buckets; the slots' permutation
    makes that as good as random.
    """

    def __init__(self, num_ids: int, device: torch.device) -> None:
        self.num_ids = num_ids
        self.counts = torch.zeros(min(num_ids, MAX_BUCKETS), dtype=torch.int64, device=device)

    def add(self, ids: Tensor) -> None:
        """Count ids of any shape."""
        buckets = ids.flatten() % self.counts.numel()
        ones = torch.ones((), dtype=torch.int64, device=ids.device).expand_as(buckets)
        self.counts.scatter_add_(0, buckets, ones)


def touched_share(counts: Tensor, num_ids: int) -> float:
    """Share of ids that occurred; estimated by linear counting where buckets are shared.

    Args:
        counts: Occurrences per bucket.
        num_ids: Size of the id space.

    Returns:
        In [0, 1]. Exact where every id has its bucket.
    """
    buckets = counts.numel()
    filled = int((counts > 0).sum())
    if buckets == num_ids:
        return filled / num_ids
    # Whang et al. (1990): D distinct ids fill B (1 - exp(-D / B)) buckets.
    empty = max(buckets - filled, 0.5)
    distinct = buckets * -float(torch.tensor(empty / buckets).log())
    return min(1.0, distinct / num_ids)


def usage_kl(counts: Tensor) -> float:
    """KL divergence of the usage from uniform over the buckets, nats; 0 = perfectly even."""
    total = float(counts.sum())
    if total == 0:
        return 0.0
    share = counts[counts > 0].double() / total
    return float((share * (share * counts.numel()).log()).sum())


class Observer(Protocol):
    """What a memory layer shows its forwards to."""

    @property
    def recall_tokens(self) -> int:
        """How many tokens the next retrieval should diagnose; 0 = none."""
        ...

    def observe(
        self,
        selection: Selection,
        rows_TK: Tensor,
        permuted_TK: Tensor,
        output_BSD: Tensor,
        residual_BSD: Tensor | None,
    ) -> None:
        """See one finished forward: selection, physical rows, permuted slots, output, stream."""
        ...


class NoStats:
    """Sees nothing: outside training, and with ``memory.stats_every=0``."""

    recall_tokens = 0

    def observe(
        self,
        selection: Selection,
        rows_TK: Tensor,
        permuted_TK: Tensor,
        output_BSD: Tensor,
        residual_BSD: Tensor | None,
    ) -> None:
        """Ignore the forward."""


NO_STATS = NoStats()


class LayerStats:
    """Accumulates one layer's statistics over a window of steps.

    Args:
        memory: Sizes of the id spaces.
        device: Where the layer runs.
    """

    def __init__(self, memory: MemoryConfig, device: torch.device) -> None:
        self.top_m = memory.top_m
        self.rows = UsageCounter(memory.num_rows, device)
        self.slots = UsageCounter(memory.num_slots, device)
        num_values = memory.tucker_rank if memory.retrieval == "tdqkr" else 0
        self.moments = torch.zeros(len(_MOMENTS) + num_values, dtype=torch.float64, device=device)
        self.sampling = False

    @property
    def recall_tokens(self) -> int:
        """See ``Observer``."""
        return RECALL_TOKENS if self.sampling else 0

    @torch.no_grad()
    def observe(
        self,
        selection: Selection,
        rows_TK: Tensor,
        permuted_TK: Tensor,
        output_BSD: Tensor,
        residual_BSD: Tensor | None,
    ) -> None:
        """See ``Observer``."""
        self.rows.add(rows_TK)
        self.slots.add(permuted_TK)
        if selection.diagnosis is None:
            return
        self.sampling = False
        totals_Xm = selection.scores_TKh.sum(-1).unflatten(1, (-1, self.top_m)).flatten(0, 1)
        output = output_BSD.float()
        sums = [
            output.new_tensor(1.0),
            output.new_tensor(float(len(totals_Xm))),
            totals_Xm[:, 0].sum(),
            totals_Xm[:, -1].sum(),
            output.new_tensor(float(output.numel())),
            output.sum(),
            output.square().sum(),
            output.new_tensor(0.0 if residual_BSD is None else float(residual_BSD.numel())),
            output.new_tensor(0.0) if residual_BSD is None else residual_BSD.float().square().sum(),
            selection.aux_loss,
            selection.diagnosis.recall,
        ]
        moments = torch.stack([value.double() for value in sums])
        singular_values_r = selection.diagnosis.singular_values_r
        if singular_values_r is not None:
            moments = torch.cat([moments, singular_values_r.double()])
        self.moments += moments

    def summary(self, moments: Tensor, usage: Tensor) -> dict[str, float]:
        """Numbers of the window from sums over ranks; see ``StatsWindow.summaries``."""
        moments = moments.cpu()
        values = dict(zip(_MOMENTS, moments.tolist()))
        result: dict[str, float] = {}
        if values["forwards"]:
            mean = values["output_sum"] / values["output_count"]
            square = values["output_square"] / values["output_count"]
            singular = moments[len(_MOMENTS) :] / values["forwards"]
            result = {
                "top1_score": values["top1_score"] / values["searches"],
                "last_score": values["last_score"] / values["searches"],
                "output_std": max(square - mean * mean, 0.0) ** 0.5,
                "aux_loss": values["aux_loss"] / values["forwards"],
                "recall": values["recall"] / values["forwards"],
                **_share_of_stream(square, values),
                **{f"singular_value_{i}": v for i, v in enumerate(singular.tolist(), 1)},
            }
        rows, slots = usage.split([self.rows.counts.numel(), self.slots.counts.numel()])
        return result | {
            "rows_touched": touched_share(rows, self.rows.num_ids),
            "slots_touched": touched_share(slots, self.slots.num_ids),
            "rows_kl": usage_kl(rows),
            "slots_kl": usage_kl(slots),
        }

    def reset(self) -> None:
        """Begin a new window."""
        self.moments.zero_()
        self.rows.counts.zero_()
        self.slots.counts.zero_()


def _share_of_stream(output_square: float, values: Mapping[str, float]) -> dict[str, float]:
    """Root mean square of the output over the residual stream's, where that was shown."""
    if not values["residual_square"]:
        return {}
    stream_square = values["residual_square"] / values["residual_count"]
    return {"output_share": (output_square / stream_square) ** 0.5}


class StatsWindow:
    """The statistics of all memory layers of a model.

    Args:
        memory: The layers' configuration.
        num_layers: How many there are.
        device: Where they run.

    Hand ``layers[i]`` to memory layer i as its ``observer``.
    """

    def __init__(self, memory: MemoryConfig, num_layers: int, device: torch.device) -> None:
        self.layers = [LayerStats(memory, device) for _ in range(num_layers)]

    def sample(self) -> None:
        """Record moments and recall at the next forward; call before the window's last step."""
        for layer in self.layers:
            layer.sampling = True

    def tensors(self) -> list[Tensor]:
        """What to sum over ranks: moments (float64) and usage counts (int64) of all layers."""
        moments = torch.cat([layer.moments for layer in self.layers])
        counts = [counter.counts for layer in self.layers for counter in (layer.rows, layer.slots)]
        return [moments, torch.cat(counts)]

    def summaries(self, tensors: Sequence[Tensor]) -> dict[str, float]:
        """Numbers of the window from ``tensors`` summed over ranks.

        Returns:
            ``layer_i/name`` for the names ``top1_score last_score output_std output_share aux_loss
            recall singular_value_1..r`` (where something was sampled) and ``rows_touched
            slots_touched`` (shares) ``rows_kl slots_kl`` (nats).
        """
        moments, usage = (tensor.chunk(len(self.layers)) for tensor in tensors)
        return {
            f"layer_{i}/{name}": value
            for i, layer in enumerate(self.layers)
            for name, value in layer.summary(moments[i], usage[i]).items()
        }

    def reset(self) -> None:
        """Begin a new window."""
        for layer in self.layers:
            layer.reset()
