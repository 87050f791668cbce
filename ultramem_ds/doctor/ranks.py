"""The ranks of a launched job: do they find each other, and how fast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch

from ultramem_ds.doctor.finding import Finding
from ultramem_ds.planning.rates import wire_gb_per_s
from ultramem_ds.sharding.comm import Comm
from ultramem_ds.zero.runtime import Ranks, runtime

CONNECT_TIMEOUT_S = 120.0
SLOW_GB_PER_S = 0.1
PAYLOAD_BYTES = 64 << 20


def joined() -> AbstractContextManager[Ranks]:
    """The process group, for as long as all ranks need it."""
    return runtime(CONNECT_TIMEOUT_S)


def check_ranks(ranks: Ranks) -> Iterator[Finding]:
    """A sum over all ranks and, with several, the rate of an all-to-all; a collective."""
    comm = Comm()
    total = comm.all_reduce_(torch.ones((), device=ranks.device)).item()
    if total != ranks.world_size:
        fix = "look at MASTER_ADDR, MASTER_PORT and the network interfaces of all machines"
        what = f"a sum over {ranks.world_size} ranks gave {total}"
        yield Finding("ranks", "fail", what, fix)
        return
    backend = torch.distributed.get_backend()
    yield Finding("ranks", "ok", f"{ranks.world_size} ranks answer through {backend}")
    if ranks.world_size == 1:
        return
    mine = wire_gb_per_s(comm, 3, ranks.device, PAYLOAD_BYTES)
    slowest = -comm.all_reduce_max_(torch.tensor(-mine, device=ranks.device)).item()
    what = f"each rank sends {slowest:.2f} GB/s in an all-to-all (memory.wire_gb_per_s)"
    if slowest < SLOW_GB_PER_S:
        fix = "set GLOO_SOCKET_IFNAME / NCCL_SOCKET_IFNAME to the fast interface"
        yield Finding("ranks", "warn", what, fix)
    else:
        yield Finding("ranks", "ok", what)
