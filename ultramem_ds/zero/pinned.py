"""What this package uses of DeepSpeed beyond its documented interface, checked when it is imported.

Every private or patched name stands here once, with what it is for and the test that fails if
DeepSpeed's behaviour behind it changes. A test compares the table with the sources of this package.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from ultramem_ds.zero.deepspeed_import import deepspeed

KNOWN = "0.19"  # the release series that the names were read in


class Pinned(NamedTuple):
    """One name of DeepSpeed's insides.

    Attributes:
        module: below ``deepspeed``; the name belongs to a class there, or is set on an object.
        name: the attribute.
        use: what it is for here.
        test: ``file::function`` under ``tests/`` that depends on its behaviour.
    """

    module: str
    name: str
    use: str
    test: str


_STAGE3, _STAGE12 = "runtime.zero.stage3", "runtime.zero.stage_1_and_2"
_PARTITION = "runtime.zero.partition_parameters"
_ENGINE = "runtime.engine"
_SWAPPER = "runtime.swap_tensor.optimizer_utils"
_PARTITIONED_SWAPPER = "runtime.swap_tensor.partitioned_optimizer_swapper"
_SERIES = "dist/test_series.py::test_series_equal_the_plain_loop"
_MOVED = "dist/test_elastic_load.py::test_two_one_four_ranks_continue_the_series"
_SHARD = "dist/test_elastic_construction.py::test_building_holds_no_more_than_a_shard"
_NVME = "dist/test_elastic_nvme.py::test_nvme_offload_gives_the_same_series"
_HELD = "dist/test_memory_planned.py::test_tables_are_held_once"
_SAVED = "dist/test_saving.py::test_background_files_are_the_foreground_s"
_BAD = "dist/test_bad_steps.py::test_not_finite_on_one_rank"

PINNED = (
    Pinned(_STAGE3, "_global_grad_norm", "the norm that the gate judges", _BAD),
    Pinned(_STAGE12, "_global_grad_norm", "the norm that the gate judges", _BAD),
    Pinned("runtime.bf16_optimizer", "_global_grad_norm", "the norm that the gate judges", _BAD),
    Pinned(
        _STAGE3,
        "_get_norm_groups",
        "wrapped: the norms of tables and of the rest, apart",
        "dist/test_pinned.py::test_norms_of_tables_and_of_the_rest_make_the_whole",
    ),
    Pinned(_PARTITION, "ds_tensor", "this rank's slice; a table's is replaced", _SHARD),
    Pinned(_PARTITION, "ds_shape", "set on a table: its whole shape", _SHARD),
    Pinned(_PARTITION, "ds_numel", "set on a table: its whole size", _SHARD),
    Pinned(_PARTITION, "ds_numel_aligned", "set on a table: its whole size", _SHARD),
    Pinned(_PARTITION, "ds_persist", "cleared on tables: never kept gathered", _SHARD),
    Pinned(_PARTITION, "all_gather", "replaced on tables: never gathered", _SHARD),
    Pinned(_PARTITION, "status", "copied to a table's new slice", _SHARD),
    Pinned(_PARTITION, "final_location", "copied to a table's new slice", _SHARD),
    Pinned(
        _PARTITION,
        "ds_zero_partition_process_group",
        "set on a table before it is partitioned: its own group",
        _SERIES,
    ),
    Pinned(_PARTITION, "ds_zero_partition_world_size", "ranks of a table's group", _SERIES),
    Pinned(_PARTITION, "ds_zero_partition_rank", "which slice is this rank's", _MOVED),
    Pinned(_STAGE3, "_get_fp32_grad_state_partition", "where a table's gradient gathers", _SERIES),
    Pinned(_STAGE3, "grad_partitions_flat_buffer", "is given huge pages", _SERIES),
    Pinned(_STAGE3, "persistent_parameters", "tables are taken out", _SHARD),
    Pinned(_STAGE3, "fp16_groups", "parameters of each flat buffer", _MOVED),
    Pinned(_STAGE3, "fp32_partitioned_groups_flat", "masters by flat buffer", _MOVED),
    Pinned(_STAGE3, "fp16_partitioned_groups_flat", "fp32 weights are their own masters", _HELD),
    Pinned(_STAGE3, "flatten", "wrapped: gradients that are flat already are not copied", _HELD),
    Pinned(_STAGE3, "_reassign_or_swap_out_partitioned_parameters", "after a load", _MOVED),
    Pinned(_STAGE3, "checkpoint_event_prologue", "small parameters follow a load", _MOVED),
    Pinned(_STAGE3, "checkpoint_event_epilogue", "small parameters follow a load", _MOVED),
    Pinned(_STAGE12, "single_partition_of_fp32_groups", "masters by flat buffer", _MOVED),
    Pinned(_STAGE12, "_hp_mapping", "where a parameter lies in its flat buffer", _MOVED),
    Pinned(
        "runtime.bf16_optimizer",
        "fp32_groups_flat_partition",
        "masters by flat buffer",
        "dist/test_elastic_bf16.py::test_two_one_four_ranks_in_bf16",
    ),
    Pinned("runtime.bf16_optimizer", "update_lp_params", "weights follow a load", _MOVED),
    Pinned(_ENGINE, "checkpoint_engine", "replaced: files are caught, not written", _SAVED),
    Pinned(_ENGINE, "_copy_recovery_script", "replaced: written with the other files", _SAVED),
    Pinned(_ENGINE, "_get_zero_ckpt_name", "which of the caught files holds the state", _SAVED),
    Pinned(_ENGINE, "zero_nvme_offload_optimizer", "replaced: swap files are left alone", _NVME),
    Pinned(_STAGE3, "_swappable_optimizer_subgroup", "which buffers are on NVMe", _NVME),
    Pinned(_STAGE3, "_optimizer_states_and_gradient_swap_in", "reads a buffer", _NVME),
    Pinned(_STAGE3, "_optimizer_states_and_gradient_swap_out", "writes a buffer back", _NVME),
    Pinned(_STAGE3, "_constant_buffered_norm2", "norm of a swapped gradient", _NVME),
    Pinned(_STAGE3, "norm_for_param_grads", "norm of a swapped gradient", _NVME),
    Pinned(_STAGE3, "grad_position", "where a table's gradient belongs", _NVME),
    Pinned(_PARTITIONED_SWAPPER, "swap_out_gradients", "replaced: gradients stay in memory", _NVME),
    Pinned(_SWAPPER, "swap_params_info", "what refers to a gradient", _NVME),
    Pinned(_SWAPPER, "unswapped_gradients", "refers to a gradient in memory", _NVME),
    Pinned(
        "runtime.zero.utils",
        "ZERO_SUPPORTED_OPTIMIZERS",
        "the optimizer of optim/adamw.py is torch's own",
        "unit/test_adamw.py::test_steps_state_and_hooks_are_torch_s",
    ),
    Pinned(
        "moe.sharded_moe",
        "TopKGate",
        "subclassed: its third value sizes the buffers of tokens, padding included",
        "dist/test_padded_experts.py::test_padding_changes_no_digit_of_the_loss",
    ),
    Pinned(
        "utils.nvtx",
        "enable_nvtx",
        "switched off: marks for a profiler, some thousand calls a step",
        "dist/test_pinned.py::test_no_marks_for_a_profiler",
    ),
    Pinned(
        _ENGINE,
        "_get_expert_ckpt_name",
        "how files of experts are named: padding's are left out",
        "dist/test_padded_experts.py::test_three_experts_on_two_ranks_are_saved_without_padding",
    ),
)


def missing(pinned: Iterable[Pinned]) -> list[Pinned]:
    """Those that the installed DeepSpeed does not know."""
    return [p for p in pinned if not re.search(rf"\b{p.name}\b", _source(p.module))]


@functools.cache
def _source(module: str) -> str:
    found: Any = deepspeed
    try:
        for part in module.split("."):
            found = getattr(found, part)
        return inspect.getsource(found)
    except (AttributeError, OSError):
        return ""


def check_names(pinned: Iterable[Pinned] = PINNED) -> None:
    """Refuse a DeepSpeed that this package does not know.

    Raises:
        ImportError: naming what is not there and the releases that have it.
    """
    if gone := missing(pinned):
        names = ", ".join(f"deepspeed.{item.module}: {item.name}" for item in gone[:3])
        more = f" and {len(gone) - 3} more" if len(gone) > 3 else ""
        raise ImportError(
            f"DeepSpeed {deepspeed.__version__} has no {names}{more}; this release knows DeepSpeed "
            f"{KNOWN}.x: pip install 'deepspeed=={KNOWN}.*'"
        )
