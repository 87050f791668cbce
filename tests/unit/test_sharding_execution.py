"""Executors: order, errors, and on CUDA the same bits from a side stream."""

import time

import pytest
import torch

from ultramem_ds.sharding.execution import (
    InlineExecutor,
    StreamExecutor,
    ThreadExecutor,
    make_executor,
)


@pytest.mark.parametrize("executor", [InlineExecutor(), ThreadExecutor()])
def test_jobs_run_in_the_order_submitted(executor):
    seen = []

    def job(i):
        def work():
            time.sleep(0.02 if i == 0 else 0.0)
            seen.append(i)
            return torch.tensor(i)

        return work

    jobs = [executor.submit(job(i)) for i in range(5)]
    assert [job.result().item() for job in reversed(jobs)] == [4, 3, 2, 1, 0]
    assert seen == [0, 1, 2, 3, 4]


def test_thread_raises_where_the_result_is_asked_for_and_lives_on():
    executor = ThreadExecutor()
    failing = executor.submit(lambda: torch.tensor([1]).view(2))
    good = executor.submit(lambda: torch.tensor(3))
    with pytest.raises(RuntimeError, match="shape"):
        failing.result()
    assert good.result().item() == 3


def test_the_setting_chooses():
    cpu = torch.device("cpu")
    assert isinstance(make_executor(False, cpu), InlineExecutor)
    assert isinstance(make_executor(True, cpu), ThreadExecutor)


@pytest.mark.gpu
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_side_stream_gives_the_same_bits():
    device = torch.device("cuda")
    x = torch.randn(512, 512, device=device)
    expected = torch.linalg.matrix_power(x / 16, 8)
    executor = make_executor(True, device)
    assert isinstance(executor, StreamExecutor)
    for _ in range(20):
        y = x / 16
        job = executor.submit(lambda y=y: torch.linalg.matrix_power(y, 8))
        del y
        _ = torch.randn(512, 512, device=device)  # would reuse y's memory too early
        assert torch.equal(job.result(), expected)
