"""The harness itself: results come back, failures and hangs are shown."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from ultramem_ds.testing.distributed import RankFailureError, run_ranks

pytestmark = pytest.mark.dist


def summing(rank, world_size, factor):
    x = torch.tensor([float(rank * factor)])
    dist.all_reduce(x)
    return x


def failing(rank, world_size):
    if rank == 1:
        raise KeyError("the reason")
    dist.barrier()


def dying(rank, world_size):
    if rank == 1:
        os._exit(7)
    dist.barrier()


def sleeping(rank, world_size):
    time.sleep(60)


def test_results_in_rank_order():
    assert [x.item() for x in run_ranks(summing, 3, 2)] == [6.0, 6.0, 6.0]


def test_failing_rank_shows_its_traceback():
    with pytest.raises(RankFailureError, match=r"rank 1: Traceback(.|\n)*the reason"):
        run_ranks(failing, 2)


def test_dead_rank_shows_its_exit_code():
    with pytest.raises(RankFailureError, match="rank 1: died with exit code 7"):
        run_ranks(dying, 2)


def test_hanging_rank_shows_where():
    with pytest.raises(RankFailureError, match=r"did not finish within 8.0 s(.|\n)*in sleeping"):
        run_ranks(sleeping, 1, timeout_s=8.0)
