"""What the launch script asks of DeepSpeed on a node whose stand-in Python says it has two GPUs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.dist.launching import ROOT

PYTHON = """#!/usr/bin/env bash
case "$*" in
  *device_count*) echo 2 ;;
  *socket*) echo 29501 ;;
  *) echo "devices=${CUDA_VISIBLE_DEVICES-unset} $*" ;;
esac
"""


def launch(tmp_path: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "NPROC")}
    return subprocess.run(
        ["bash", str(ROOT / "launch" / "one_node.sh"), "train"],
        env={**kept, "PYTHON": str(python), **settings},
        capture_output=True,
        text=True,
    )


def test_all_gpus_by_default(tmp_path: Path) -> None:
    out = launch(tmp_path).stdout
    assert out.startswith("devices=unset -m ultramem_ds.launcher --num_gpus 2 ")


def test_chosen_gpus_are_left_chosen(tmp_path: Path) -> None:
    """Given a number, DeepSpeed takes GPUs 0 and 1."""
    out = launch(tmp_path, CUDA_VISIBLE_DEVICES="4,5").stdout
    assert out.startswith("devices=4,5 ") and "--num_gpus" not in out
    out = launch(tmp_path, CUDA_VISIBLE_DEVICES="4,5", NPROC="1").stdout
    assert out.startswith("devices=4 ") and "--num_gpus" not in out


def test_more_ranks_than_chosen_gpus(tmp_path: Path) -> None:
    refused = launch(tmp_path, CUDA_VISIBLE_DEVICES="4,5", NPROC="8")
    assert refused.returncode == 2 and "shows 2 GPUs" in refused.stderr
