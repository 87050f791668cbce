"""What makes a run fit that does not: changes that were tried on the plan, not guesses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ultramem_ds.config.deepspeed import load_deepspeed_json, offload_device
from ultramem_ds.config.schema import Config
from ultramem_ds.planning.planner import Plan, make_plan

GPU_OFFLOAD = "ds_configs/ultramem_zero3_cpu_offload.json"
CPU_OFFLOAD = "ds_configs/ultramem_zero3_nvme_offload.json"


def device_bytes(plan: Plan, deepspeed_json: Mapping[str, Any], on_gpu: bool) -> int:
    """What a rank needs where it computes: optimizer state that is offloaded lies elsewhere."""
    elsewhere = ("cpu", "nvme") if on_gpu else ("nvme",)
    parts = plan.memory.parts()
    if offload_device(dict(deepspeed_json)) not in elsewhere:
        return parts["total"]
    return parts["total"] - parts["optimizer"] + plan.own_optimizer_bytes


def ways_to_fit(
    config: Config,
    world_size: int,
    deepspeed_json: Mapping[str, Any],
    free_bytes: int,
    on_gpu: bool,
) -> list[str]:
    """Changes of a run, each of which alone makes a rank fit, or else one of several together.

    Args:
        config: with a fixed micro-batch size.
        world_size: ranks.
        deepspeed_json: contents of the DeepSpeed JSON.
        free_bytes: what a rank may take.
        on_gpu: whether ranks compute on GPUs.
    """

    def fits(micro: int, ranks: int, values: Mapping[str, Any]) -> bool:
        tried = replace(config, train=replace(config.train, micro_batch_size=micro))
        try:
            plan = make_plan(tried, ranks, values)
        except ValueError:  # does not divide
            return False
        return device_bytes(plan, values, on_gpu) <= free_bytes

    now = config.train.micro_batch_size
    assert now != "auto"
    more = list(_more_ranks(config.train.global_batch_size, world_size))
    smaller = range(now - 1, 0, -1)
    file, values = "", deepspeed_json
    if config.model.kind != "moe" and offload_device(dict(deepspeed_json)) == "none":
        file = GPU_OFFLOAD if on_gpu else CPU_OFFLOAD
        values = load_deepspeed_json(Path(file), config.model.kind)
    ways = []
    if ranks := next((r for r in more if fits(now, r, deepspeed_json)), 0):
        ways.append(f"{ranks} ranks")
    if micro := next((m for m in smaller if fits(m, world_size, deepspeed_json)), 0):
        ways.append(f"train.micro_batch_size={micro}")
    if file and fits(now, world_size, values):
        ways.append(f"--deepspeed {file}")
    if not ways and (ranks := next((r for r in (world_size, *more) if fits(1, r, values)), 0)):
        together = f"{ranks} ranks with train.micro_batch_size=1"
        ways.append(f"{together} and --deepspeed {file}" if file else together)
    return ways


def _more_ranks(global_batch_size: int, world_size: int) -> Iterator[int]:
    """Twice as many, and so on, while the batch has a sequence for each."""
    ranks = 2 * world_size
    while ranks <= global_batch_size:
        yield ranks
        ranks *= 2
