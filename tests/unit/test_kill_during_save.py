"""kill -9 at any moment of a save: there always is a whole checkpoint, and the next save works."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from tests.unit.test_run_files import state
from ultramem_ds.checkpoint import directory as checkpoints
from ultramem_ds.checkpoint.rank_files import RankFiles
from ultramem_ds.checkpoint.record import read_layout, verify, write_layout

# Whatever Python does to a directory or opens in it, before it does so.
EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}


def save(run_dir: Path, step: int) -> None:
    """A save as one rank makes it, the previous checkpoint to be removed."""
    staging = checkpoints.begin(run_dir, step)
    values = {"values": torch.full((1000,), float(step))}
    sources = {f"part_{i}.pt": lambda: values for i in range(3)}
    RankFiles(0, sources, {}).write(staging)
    checkpoints.publish(run_dir, state(step), lambda path: write_layout(path, 1, {}), 1, 0)


def kill_at(run_dir: Path, moment: int) -> bool:
    """Save step 2 in another process, killed at its ``moment``-th event; False if it has less."""
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in EVENTS and arguments and str(arguments[0]).startswith(str(run_dir)):
                if seen == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1

        try:
            sys.addaudithook(hook)
            save(run_dir, 2)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_every_moment(tmp_path: Path) -> None:
    save(tmp_path / "first", 1)
    before, after = 0, 0
    while True:
        run_dir = tmp_path / str(before + after)
        shutil.copytree(tmp_path / "first", run_dir)
        if not kill_at(run_dir, before + after):
            break
        found = checkpoints.newest_readable(run_dir)
        assert found is not None
        assert found == checkpoints.latest_checkpoint(run_dir)
        verify(found, read_layout(found), 0, 1)
        step = checkpoints.read_trainer_state(found).step
        assert torch.load(found / "part_2.pt")["values"][0] == step
        before, after = before + (step == 1), after + (step == 2)
        assert after == 0 or step == 2  # once published, published
        save(run_dir, 3)
        names = {path.name for path in checkpoints.checkpoints_dir(run_dir).iterdir()}
        assert {name for name in names if not name.startswith("zero_to")} == {
            "latest",
            "step-00000003",
        }
    # Both sides of the moment at which the new one counts have been met.
    assert before > 15 and after >= 5
