"""Offload's needs are checked before a model is built; stale build locks do not hang."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ultramem_ds.config.deepspeed import CONFIG_DIR, load_deepspeed_json
from ultramem_ds.zero import offload


def test_nvme_without_libaio_is_one_clear_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is built; the message names the package and the way out."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    config = load_deepspeed_json(CONFIG_DIR / "ultramem_zero3_nvme_offload.json", "ultramem")
    with pytest.raises(ValueError, match="libaio-dev.*cpu_offload.json"):
        offload.prepare_offload(config, rank=0)


def test_stale_build_lock_is_removed(tmp_path: Path) -> None:
    """Left behind long ago: removed at once. The directory's other files stay."""
    for name in ("lock", "build.ninja"):
        (tmp_path / name).write_text("")
    past = time.time() - 2 * offload.STALE_AFTER_S
    for path in (tmp_path / "lock", tmp_path / "build.ninja", tmp_path):
        os.utime(path, (past, past))
    offload.remove_stale_lock(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["build.ninja"]


def test_build_lock_of_a_dead_process_is_removed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Just written, by a process that was killed: removed at once, and said."""
    code = "import os, sys; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "lock")], check=False)
    assert (tmp_path / "lock").exists()
    offload.remove_stale_lock(tmp_path)
    assert not (tmp_path / "lock").exists()
    assert "left behind by a killed process" in capfd.readouterr().err


def test_fresh_build_lock_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody is compiling: their lock goes when they are done."""
    descriptor = os.open(tmp_path / "lock", os.O_CREAT | os.O_EXCL)  # as PyTorch keeps it
    waits = []

    def finish_after_two(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            (tmp_path / "lock").unlink()

    monkeypatch.setattr(offload.time, "sleep", finish_after_two)
    offload.remove_stale_lock(tmp_path)
    os.close(descriptor)
    assert len(waits) == 2


def test_swap_directory_is_for_one_run(tmp_path: Path) -> None:
    """Another process is told so; this one may claim it again, and another rank's part."""
    offload.claim_swap_directory(tmp_path, rank=0)
    offload.claim_swap_directory(tmp_path, rank=0)
    code = (
        "import sys; from pathlib import Path; from ultramem_ds.zero import offload\n"
        "offload.claim_swap_directory(Path(sys.argv[1]), rank=1)\n"
        "offload.claim_swap_directory(Path(sys.argv[1]), rank=0)"
    )
    other = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert f"nvme_path={tmp_path} is in use by another run" in other.stderr


def test_swap_directory_must_be_usable(tmp_path: Path) -> None:
    """A file in its place: named, with what to do."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="nvme_path=.*file cannot be used.*writable directory"):
        offload.claim_swap_directory(tmp_path / "file", rank=0)
