"""Building never holds a tensor of a whole table, and every scheme builds the same one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # what ZeRO's construction loads, before a mode watches it
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.dist.elastic_series import Leg, build_engine, run_leg
from ultramem_ds.infer.load import load_model
from ultramem_ds.testing.distributed import run_ranks

# Tables dominate: 192 * 192 rows of 16 columns, against 64 * 32 for the embedding. Initialisation
# draws blocks of 4096 rows, a ninth of a table; a rank's peak is measured on 512 * 512 elements.
BIG = ("memory.knum=192", "memory.value_dim=16")
TABLE_ELEMENTS = 192 * 192 * 16
SCHEMES = ("number-wise", "dimension-wise", "owner-pooled")


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any floating-point result of an operation had in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.device.type != "meta":
                held = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.num_elements = max(self.num_elements, held)
        return result


def largest_while_building(rank: int, world_size: int, legs: list[Leg]) -> list[int]:
    """Elements of the largest storage met while building each leg's engine."""
    found = []
    for leg in legs:
        with LargestTensor() as largest:
            engine = build_engine(leg, rank, world_size)
        found.append(largest.num_elements)
        assert engine.tables is not None
        shards = [shard.values().numel() for shard in engine.tables.shards]
        assert all(numel < TABLE_ELEMENTS / world_size * 1.01 for numel in shards)
        engine.engine.destroy()
    return found


@pytest.mark.dist
def test_building_holds_no_more_than_a_shard(tmp_path: Path) -> None:
    """Every scheme on 4 ranks: all of a rank's shards and parameters in one buffer at most."""
    zero = {"stage": 3, "reduce_bucket_size": 4096, "stage3_prefetch_bucket_size": 4096}
    small_buckets = tmp_path / "deepspeed.json"  # the shipped buckets are larger than the tables
    small_buckets.write_text(json.dumps({"zero_optimization": zero}))
    legs = [
        Leg(
            kind="ultramem",
            begin=0,
            end=0,
            run_dir=tmp_path,
            overrides=(*BIG, f"memory.partition={scheme}"),
            deepspeed_file=small_buckets,
        )
        for scheme in SCHEMES
    ]
    for rank_found in run_ranks(largest_while_building, 4, legs):
        for num_elements in rank_found:
            # ZeRO-3 lays a rank's slices of all parameters into one buffer: a quarter of the
            # table and of everything else.
            assert TABLE_ELEMENTS / 4 <= num_elements < TABLE_ELEMENTS / 2


def save_untrained(rank: int, world_size: int, legs: list[Leg]) -> None:
    """Checkpoints of the initial values."""
    for leg in legs:
        run_leg(leg, rank, world_size)


@pytest.mark.dist
def test_initial_values_are_those_of_one_process(tmp_path: Path) -> None:
    """To the bit, for any scheme and world size, compared through checkpoints."""
    # A step that changes no fp32 value, not even a zero: this rate is below the least subnormal.
    tiny = ("optim.lr=1e-60", "optim.weight_decay=0.0")
    legs = {
        scheme: Leg(
            kind="ultramem",
            begin=0,
            end=1,
            run_dir=tmp_path / scheme,
            overrides=(*tiny, f"memory.partition={scheme}"),
        )
        for scheme in SCHEMES
    }
    single = replace(legs["number-wise"], run_dir=tmp_path / "single")
    run_ranks(save_untrained, 1, [single])
    run_ranks(save_untrained, 4, list(legs.values()))
    expected = load_model(single.run_dir).state_dict()
    for scheme, leg in legs.items():
        for name, value in load_model(leg.run_dir).state_dict().items():
            assert torch.equal(value, expected[name]), f"{scheme}: {name}"
