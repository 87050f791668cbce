"""Every collective on equal, unequal and empty splits: values, gradients and counted bytes."""

import itertools

import pytest
import torch

from ultramem_ds.sharding.comm import Comm, split_ranks
from ultramem_ds.testing.distributed import run_ranks

pytestmark = pytest.mark.dist

# SPLITS[name][p][q]: entries that rank p sends to rank q.
SPLITS = {
    "equal": [[2, 2, 2]] * 3,
    "unequal": [[1, 0, 4], [2, 3, 0], [0, 5, 1]],
    "a rank sends nothing": [[1, 2, 3], [0, 0, 0], [4, 5, 6]],
    "nobody asks a rank": [[2, 0, 1], [3, 0, 1], [1, 0, 1]],
    "nothing at all": [[0, 0, 0]] * 3,
}
DTYPES = (torch.float32, torch.bfloat16, torch.int32, torch.int64)


def payload(rank, count, dtype):
    """Entries of two numbers that tell their sender and place; exact in every dtype."""
    place = torch.arange(count) + 16 * rank
    return torch.stack([place, -place], dim=1).to(dtype)


def sent_to(sender, receiver, splits, dtype):
    x = payload(sender, sum(splits[sender]), dtype)
    return x.split(splits[sender])[receiver]


def all_to_all_body(rank, world_size):
    comm = Comm()
    for (name, splits), dtype in itertools.product(SPLITS.items(), DTYPES):
        send, recv = splits[rank], [splits[p][rank] for p in range(world_size)]
        x = payload(rank, sum(send), dtype)
        if dtype.is_floating_point:
            x.requires_grad_()
        comm.bytes_sent.clear()
        y = comm.all_to_all(x, send, recv, "rows")
        expected = torch.cat([sent_to(p, rank, splits, dtype) for p in range(world_size)])
        assert torch.equal(y, expected), (name, dtype)
        others = sum(send) - send[rank]
        assert comm.bytes_sent["rows", "forward"] == others * 2 * dtype.itemsize, name
        if dtype.is_floating_point:
            (y * (rank + 1)).sum().backward()
            scale = torch.repeat_interleave(torch.arange(1, world_size + 1), torch.tensor(send))
            assert torch.equal(x.grad, scale[:, None].expand(-1, 2).to(dtype)), (name, dtype)
            received = sum(recv) - recv[rank]
            assert comm.bytes_sent["rows", "backward"] == received * 2 * dtype.itemsize, name


def test_all_to_all():
    run_ranks(all_to_all_body, 3)


def gather_body(rank, world_size):
    comm = Comm()
    for count, dtype in itertools.product((0, 1, 5), DTYPES):
        x = payload(rank, count, dtype)
        if dtype.is_floating_point:
            x.requires_grad_()
        comm.bytes_sent.clear()
        y = comm.all_gather(x, "ids")
        assert torch.equal(y, torch.stack([payload(p, count, dtype) for p in range(world_size)]))
        assert comm.bytes_sent["ids", "forward"] == 2 * count * 2 * dtype.itemsize
        if dtype.is_floating_point:
            (y * (rank + 1)).sum().backward()
            assert torch.equal(x.grad, torch.full_like(x, 1 + 2 + 3)), (count, dtype)
            assert comm.bytes_sent["ids", "backward"] == 2 * count * 2 * dtype.itemsize
    counts_PX = torch.tensor([[10 * rank + p, p] for p in range(world_size)])
    received_PX = comm.exchange_counts(counts_PX)
    assert received_PX.tolist() == [[10 * p + rank, rank] for p in range(world_size)]
    assert comm.all_reduce_(torch.tensor([float(rank)])).item() == 3.0


def test_gathers_counts_and_sums():
    run_ranks(gather_body, 3)


def split_body(rank, world_size):
    found = {}
    for size in (0, 1, 2, 4):
        shard, replicas = split_ranks(size)
        found[size] = [
            [comm.global_rank(p) for p in range(comm.world_size)] for comm in (shard, replicas)
        ]
        # Sums over both groups reach every rank once: the groups are real and independent.
        total = replicas.all_reduce_(shard.all_reduce_(torch.tensor([float(rank)])))
        assert total.item() == sum(range(world_size)), size
    return found


def test_sub_groups_are_contiguous_and_replicas_strided():
    everybody, strided = [0, 1, 2, 3], [[0, 2], [1, 3]]
    for rank, found in enumerate(run_ranks(split_body, 4)):
        assert found[0] == found[4] == [everybody, [rank]]
        assert found[1] == [[rank], everybody]
        assert found[2] == [[0, 1] if rank < 2 else [2, 3], strided[rank % 2]]
