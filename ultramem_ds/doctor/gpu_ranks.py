"""Lookups between two devices: every partition scheme over NCCL against the whole table on one."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ultramem_ds.config.memory import MemoryConfig
from ultramem_ds.kernels import lookup_reduce
from ultramem_ds.sharding.groups import make_groups
from ultramem_ds.sharding.lookup import SCHEMES, build_lookup
from ultramem_ds.sharding.shard import TableShard
from ultramem_ds.sharding.table_plan import TableSpec, shard_layout
from ultramem_ds.testing.distributed import run_ranks

# T tokens, K rows per token, h cores, E expansion, R rows of the table, V value width.

SPEC = TableSpec(num_rows=1000, value_dim=64, num_projectors=4, num_cores=2)
TOKENS, ENTRIES, LOOKUPS = 48, 16, 3
RTOL = 1e-5  # fp32 sums of at most 16 products, in another order


def check_lookups(device_type: str) -> str:
    """Run all schemes, asynchronously, on two ranks; one line.

    Raises:
        AssertionError: a result is off by more than ``RTOL``.
    """
    backend: Literal["gloo", "nccl"] = "nccl" if device_type == "cuda" else "gloo"
    found = run_ranks(_errors, 2, device_type, timeout_s=120.0, backend=backend)
    worst = {scheme: max(errors[scheme] for errors in found) for scheme in SCHEMES}
    for scheme, error in worst.items():
        if not error <= RTOL:
            raise AssertionError(f"{scheme} over {backend}: off by {error:.2g} from one table")
    return f"lookups of two ranks over {backend}: " + ", ".join(
        f"{scheme} {error:.1g}" for scheme, error in worst.items()
    )


def _inputs(rank: int, device: torch.device) -> tuple[Tensor, ...]:
    """Rows, projectors, scores and output gradient of one rank, the same wherever drawn."""
    draw = torch.Generator().manual_seed(rank)
    shape = (TOKENS, ENTRIES)
    rows_TK = torch.randint(SPEC.num_rows, shape, generator=draw)
    projectors_TK = torch.randint(SPEC.num_projectors, shape, generator=draw)
    scores_TKh = torch.randn(*shape, SPEC.num_cores, generator=draw)
    grad_TEV = torch.randn(TOKENS, SPEC.num_projectors, SPEC.value_dim, generator=draw)
    return tuple(tensor.to(device) for tensor in (rows_TK, projectors_TK, scores_TKh, grad_TEV))


def _errors(rank: int, world_size: int, device_type: str) -> dict[str, float]:
    """Of each scheme on one rank: the largest error, relative to the largest value."""
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    draw = torch.Generator().manual_seed(100)
    whole_RV = torch.randn(SPEC.num_rows, SPEC.value_dim, generator=draw).to(device)
    wanted = [_on_one(whole_RV, other, device) for other in range(world_size)]
    return {scheme: _error(scheme, whole_RV, rank, wanted, device) for scheme in SCHEMES}


def _on_one(whole_RV: Tensor, rank: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled values, gradients of scores and table of one rank's lookups, from the whole table."""
    rows_TK, projectors_TK, scores_TKh, grad_TEV = _inputs(rank, device)
    scores_TKh.requires_grad_()
    grad_RV = torch.zeros_like(whole_RV)
    pooled_TEV = lookup_reduce(
        whole_RV,
        rows_TK,
        projectors_TK,
        scores_TKh,
        SPEC.num_projectors,
        grad_values_RV=grad_RV,
        kernel="reference",
    )
    pooled_TEV.backward(grad_TEV)
    assert scores_TKh.grad is not None
    return pooled_TEV.detach(), scores_TKh.grad, grad_RV


def _error(
    scheme: str,
    whole_RV: Tensor,
    rank: int,
    wanted: list[tuple[Tensor, Tensor, Tensor]],
    device: torch.device,
) -> float:
    groups = make_groups(asynchronous=True, device=device)
    layout = shard_layout(SPEC, scheme, len(wanted), rank)
    rows = slice(layout.first_row, layout.first_row + layout.num_rows)
    columns = slice(layout.first_column, layout.first_column + layout.num_columns)
    block = whole_RV[rows, columns].contiguous()
    shard = TableShard(SPEC, layout, lambda: block, groups.replicas)
    memory = MemoryConfig(value_dim=SPEC.value_dim, num_cores=SPEC.num_cores)
    lookup = build_lookup(shard, scheme, groups, memory)
    rows_TK, projectors_TK, scores_TKh, grad_TEV = _inputs(rank, device)
    worst = 0.0
    for _ in range(LOOKUPS):
        scores = scores_TKh.clone().requires_grad_()
        pooled_TEV = lookup.start(rows_TK, projectors_TK, scores).wait()
        pooled_TEV.backward(grad_TEV)
        assert scores.grad is not None
        grad_RV = sum(grads[2][rows, columns] for grads in wanted)
        assert isinstance(grad_RV, Tensor)
        found = (pooled_TEV.detach(), scores.grad, shard.grad_RV)
        for ours, right in zip(found, (*wanted[rank][:2], grad_RV)):
            error = (ours - right).abs().max() / right.abs().max()
            worst = max(worst, float(error))
        groups.shard.barrier()
        shard.zero_gradient()
    return worst
