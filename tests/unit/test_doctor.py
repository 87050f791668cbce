"""``doctor``: sees what is wrong, says what to do, and its exit code says whether to."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from tests.conftest import RUN_OVERRIDES
from tests.dist.launching import run_verb
from ultramem_ds.doctor import machine, software
from ultramem_ds.doctor.finding import Finding, describe, must_fix
from ultramem_ds.doctor.inputs import Wanted, check_inputs


def test_a_good_environment_on_two_ranks(prepared: Path, trained: Path) -> None:
    result = run_verb(
        "doctor", "--preset", "ultramem-debug", "--data", str(prepared), "--run-dir",
        str(trained), "--json", *RUN_OVERRIDES, nproc=2,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    begin = result.stdout.index("{\n")
    document, _ = json.JSONDecoder().raw_decode(result.stdout[begin:])
    assert document["ok"] is True
    text = "\n".join(finding["what"] for finding in document["findings"])
    assert "2 ranks answer through gloo" in text
    assert "GB/s in an all-to-all (memory.wire_gb_per_s)" in text
    assert "native lookup kernel works" in text
    assert "would be resumed from step 2" in text
    assert "2 ranks x 2 sequences x 1 forwards" in text
    areas = {finding["area"] for finding in document["findings"]}
    assert areas >= {"python", "packages", "kernels", "gpu", "machine", "disk", "ranks", "config"}


def test_what_must_be_fixed_gives_exit_code_1(prepared: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(prepared, tmp_path / "data"))
    (data / "odd.bin").write_bytes(b"")
    result = run_verb("doctor", "--preset", "ultramem-debug", "--data", str(data))
    assert result.returncode == 1
    assert "FAIL data" in result.stdout and "odd.bin" in result.stdout
    assert "1 to fix before training" in result.stdout


def test_packages_are_compared_with_the_checkout(tmp_path: Path) -> None:
    requirements = ["torch>=99", "numpy>=1", "no-such-package>=1"]
    lines = "\n".join(f"    {line}" for line in requirements)
    (tmp_path / "setup.cfg").write_text(f"[options]\ninstall_requires =\n{lines}\n\n[other]\n")
    (tmp_path / "constraints.txt").write_text("torch==1.0\n")
    found = list(software.check_packages(tmp_path))
    assert [f.status for f in found] == ["fail", "fail", "warn", "ok"]
    assert "torch>=99 is needed, version" in found[0].what
    assert "no-such-package>=1 is needed, not installed" in found[1].what
    assert "tested with 1.0" in found[2].what


def test_old_build_locks_are_found_and_fresh_ones_left(tmp_path: Path) -> None:
    for name, age_s in (("old", 3600), ("fresh", 0)):
        lock = tmp_path / name / "lock"
        lock.parent.mkdir()
        lock.touch()
        os.utime(lock, (time.time() - age_s,) * 2)
    (found,) = software.stale_locks(tmp_path)
    assert found.status == "fail" and found.fix == f"rm {tmp_path / 'old' / 'lock'}"


def test_segments_of_dead_runs_are_found(tmp_path: Path) -> None:
    (tmp_path / "deepspeed_allreduce_buffer_0_29500").write_bytes(bytes(1000))
    found = [f for f in machine.check_shared_memory(tmp_path) if "dead runs" in f.what]
    assert len(found) == 1 and found[0].status == "warn" and str(tmp_path) in found[0].fix


def test_disk_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    run_dir = tmp_path / "not" / "yet"
    found = list(machine.check_disk(run_dir, needed_bytes=1000))
    assert not must_fix(found)
    assert not list(tmp_path.iterdir())
    too_much = list(machine.check_disk(run_dir, needed_bytes=1 << 60))
    assert must_fix(too_much) and "another --run-dir" in too_much[0].fix


def test_names_that_do_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "29500"}
    for name, value in {**ranks, "MASTER_ADDR": "no-such-host.invalid"}.items():
        monkeypatch.setenv(name, value)
    assert "no-such-host.invalid" in " ".join(
        f.what for f in machine.check_names() if f.status == "fail"
    )


def test_inputs_stop_at_the_first_problem(prepared: Path, tmp_path: Path) -> None:
    wanted = Wanted(preset="dense-debug", overrides=["train.max_stpes=1"], data=prepared)
    (found,) = check_inputs(wanted)
    assert found.area == "config" and "train.max_steps" in found.what
    assert wanted.disk_bytes() == 0
    assert list(check_inputs(Wanted())) == []


def test_findings_as_text() -> None:
    text = describe([Finding("disk", "ok", "fine"), Finding("gpu", "warn", "slow", "do this")])
    assert "warn gpu" in text and "-> do this" in text
    assert text.endswith("ready to train, 1 warnings")
