"""Optimizer state on NVMe: the same series as without, and checkpoints that move both ways."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import VOCAB_SIZE
from tests.dist.elastic_series import Leg, run_legs
from tests.dist.launching import run_verb
from tests.dist.test_elastic_export import assert_same_weights, deepspeed_weights
from ultramem_ds.config.deepspeed import CONFIG_DIR
from ultramem_ds.zero.default_layout import write_default_layout
from ultramem_ds.infer.load import load_model
from ultramem_ds.zero.offload import build_op
from ultramem_ds.testing.distributed import run_ranks

NVME_OFFLOAD = CONFIG_DIR / "ultramem_zero3_nvme_offload.json"

# DeepSpeed's CPU Adam orders its fp32 operations otherwise than torch's: 1e-7 per step and weight.
TOLERANCE = dict(rtol=1e-5, atol=1e-6)

# 201 * 201 rows of 16, in two tables: each rank's slice of one is just above the least that the
# swapper takes (1 MiB) and a multiple of no disk block, so that the second's offset is odd.
TABLES = ("memory.knum=201", "memory.placement=1:1/2:2")


def libaio() -> bool:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    with contextlib.redirect_stdout(sys.stderr):
        return bool(AsyncIOBuilder().is_compatible(verbose=False))


needs_libaio = pytest.mark.skipif(
    not libaio(), reason="libaio and its headers (libaio-dev) are not installed"
)


@pytest.fixture(scope="module")
def ops() -> None:
    """Built before any test starts its clock."""
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder

    build_op(AsyncIOBuilder())
    build_op(CPUAdamBuilder())


def nvme_file(tmp_path: Path, **zero: int) -> Path:
    """The shipped file, swapping to ``tmp_path``."""
    values = json.loads(NVME_OFFLOAD.read_text())
    values["zero_optimization"].update(zero)
    values["zero_optimization"]["offload_optimizer"]["nvme_path"] = str(tmp_path / "swap")
    path = tmp_path / f"nvme{len(zero)}.json"
    path.write_text(json.dumps(values))
    return path


@pytest.mark.dist
@needs_libaio
def test_nvme_offload_gives_the_same_series(ops: None, tmp_path: Path) -> None:
    """On 2 ranks, all tables in one flat buffer; resumed with one each; on 1 rank without; back."""
    plain = Leg(
        kind="ultramem", begin=0, end=6, run_dir=tmp_path / "plain", save=False, overrides=TABLES
    )
    first = replace(
        plain, end=2, run_dir=tmp_path / "run", deepspeed_file=nvme_file(tmp_path), save=True
    )
    buffer_each = nvme_file(tmp_path, sub_group_size=300_000)
    again = replace(first, begin=2, end=4, deepspeed_file=buffer_each)
    expected, offloaded, resumed = run_ranks(run_legs, 2, [plain, first, again])[0]
    swapped = list((tmp_path / "swap").rglob("*.tensor.swp"))
    assert len({path.name for path in swapped if path.name.startswith("exp_avg_sq")}) >= 2
    without = replace(first, begin=4, end=5, deepspeed_file=None)
    back = replace(first, begin=5, end=6)
    one, two = run_ranks(run_legs, 1, [without, back])[0]
    torch.testing.assert_close(
        torch.tensor(offloaded + resumed + one + two), torch.tensor(expected), **TOLERANCE
    )


@pytest.mark.dist
@needs_libaio
def test_train_resume_and_rewrite_through_the_launcher(
    ops: None, prepared: Path, tmp_path: Path
) -> None:
    """As people run it; the checkpoint then becomes one that DeepSpeed's own tools read."""
    run_dir = tmp_path / "run"
    command = ["train", "--preset", "ultramem-debug", "--data", str(prepared)]
    command += ["--run-dir", str(run_dir), "--deepspeed", str(nvme_file(tmp_path)), *TABLES]
    command += ["model.seq_len=64", f"model.vocab_size={VOCAB_SIZE}", "train.global_batch_size=8"]
    command += ["train.max_steps=4", "train.eval_sequences=8"]
    stopped = run_verb(*command, "train.stop_at_step=2", nproc=2)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    resumed = run_verb(*command, nproc=2)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "resuming" in resumed.stdout
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    write_default_layout(run_dir, tmp_path / "default", world_size=2)
    assert_same_weights(load_model(run_dir).state_dict(), deepspeed_weights(tmp_path / "default"))


def test_without_libaio_training_ends_with_one_line(prepared: Path, tmp_path: Path) -> None:
    """The compiler is made to fail, so that DeepSpeed reports the op as incompatible."""
    run = run_verb(
        "train", "--preset", "ultramem-debug", "--data", str(prepared), "--run-dir",
        str(tmp_path / "run"), "--deepspeed", str(nvme_file(tmp_path)),
        f"model.vocab_size={VOCAB_SIZE}", CC="false",
    )  # fmt: skip
    assert run.returncode == 2, run.stderr
    assert "libaio-dev" in run.stderr.splitlines()[-1] and "Traceback" not in run.stderr
