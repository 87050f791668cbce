"""The lint check finds collectives however they are spelled, and nothing else."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_SPEC = importlib.util.spec_from_file_location(
    "check_collectives", ROOT / "scripts" / "check_collectives.py"
)
check = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(check)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.distributed.all_reduce(x)",
        "import torch.distributed as dist\ndist.all_to_all_single(x, y)",
        "from torch import distributed as d\nd.barrier()",
        "from torch.distributed import broadcast_object_list",
        "import deepspeed.comm as c\nf = c.inference_all_reduce",
        "from pkg.deepspeed_import import deepspeed\ndeepspeed.comm.reduce_scatter_tensor(x)",
        "import torch.distributed.distributed_c10d as c\nc._coalescing_manager()",
    ],
)
def test_collectives_are_found(source):
    assert [line for line, _ in check.collectives(source)] == [source.count("\n") + 1]


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist\ndist.get_rank(); dist.destroy_process_group()",
        "import torch\ntorch.gather(x, 0, i)",
        "self.comm.all_reduce_(x)",
        "import functools\nfunctools.reduce(f, x)",
    ],
)
def test_other_calls_are_not(source):
    assert list(check.collectives(source)) == []


def test_the_package_is_clean(capsys):
    assert check.main() == 0, capsys.readouterr().out
