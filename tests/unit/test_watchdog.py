"""Who may take how long, what counts as a launcher, one job per run directory."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from ultramem_ds.telemetry.phases import Phases
from ultramem_ds.utils.processes import find_process, is_alive, is_launcher, launchers_above
from ultramem_ds.watch import watchdog
from ultramem_ds.watch.faultlog import log_fault
from ultramem_ds.watch.roster import Roster
from ultramem_ds.watch.runlock import only_job
from ultramem_ds.watch.watchdog import FIRST_STEP_S, LONG_PHASE_S, START_S, allowed_s
from ultramem_ds.zero.runtime import Ranks


def test_what_is_slow_without_being_stuck_gets_more_time() -> None:
    assert allowed_s(60, "start", 0, 0) == 60 + START_S
    assert allowed_s(60, "forward", 11, 11) == 60 + FIRST_STEP_S
    assert allowed_s(60, "forward", 12, 11) == 60
    assert allowed_s(60, "save", 12, 11) == 60 + LONG_PHASE_S["save"]
    assert allowed_s(60, "validate", 11, 11) == 60 + LONG_PHASE_S["validate"]


def test_the_first_step_is_known_however_fast_it_was() -> None:
    """A thread that looks now and then may see a later one first."""
    phases = Phases()
    assert phases.first_step == 0
    for step in (11, 12, 13):
        phases.begin_step(step)
    assert (phases.step, phases.first_step) == (13, 11)


def test_launchers() -> None:
    python = "/usr/bin/python3"
    for command in (
        [python, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"],
        [python, "-u", "-m", "deepspeed.launcher.launch", "--world_info=e30="],
        [python, "/opt/venv/bin/deepspeed", "--module", "ultramem_ds", "train"],
        [python, "-m", "ultramem_ds.launcher", "--num_gpus", "2"],
        ["bash", "launch/multi_node.sh", "train"],
        [python, "/opt/venv/bin/torchrun", "-m", "ultramem_ds"],
    ):
        assert is_launcher(command), command
    for command in (["bash"], ["bash", "-c", "deepspeed --module ultramem_ds train"], ["sshd"], []):
        assert not is_launcher(command), command
    assert launchers_above() == []  # one process hangs on nobody


def test_processes_are_told_apart() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    created = psutil.Process(child.pid).create_time()
    found = find_process(child.pid, created)
    assert found is not None and is_alive(found)
    assert find_process(child.pid, created - 1) is None  # the number alone could be another's
    child.kill()
    time.sleep(0.2)
    assert not is_alive(found)  # nobody has waited for it yet
    child.wait()
    assert find_process(child.pid, created) is None


HOLD = """
import sys, time
from pathlib import Path
from ultramem_ds.watch.runlock import only_job
with only_job(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_job_per_run_directory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"in use by pid {other.pid}"), only_job(tmp_path, 0.6):
        pass
    other.kill()  # lets go, however it ends
    with only_job(tmp_path, 5.0):
        pass
    other.wait()


def test_first_alarm_wins(tmp_path: Path) -> None:
    job = Roster.reset(tmp_path)
    phases = Phases()
    phases.step = 3
    first, second = (Roster(tmp_path, job, rank, phases) for rank in (0, 1))
    first.sign()
    second.sign()
    assert [other.rank for other in first.others()] == [1]
    assert first.others()[0].where() == "step 3, phase start"
    assert first.others()[0].state() in ("running", "sleeping", "disk-sleep")
    assert first.alarm() is None
    assert second.raise_alarm("failure", 2, "first") and not first.raise_alarm("hang", 3, "late")
    alarm = first.alarm()
    assert alarm is not None and (alarm.kind, alarm.rank, alarm.code) == ("failure", 1, 2)


@pytest.mark.parametrize("said", [True, False])
def test_who_dies_before_it_can_say_why_is_spoken_for(
    said: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rank that raised the alarm is killed; the reason is printed once, and the code is its."""
    job, phases, ended = Roster.reset(tmp_path), Phases(), []
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    raiser = Roster(tmp_path, job, 1, phases)
    raiser.sign()
    path = raiser.directory / "rank-00001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pid": dead.pid}))
    assert raiser.raise_alarm("failure", 2, "rank 1 failed: no such thing")
    if said:
        assert raiser.mark_said()
    monkeypatch.setattr(watchdog.os, "_exit", ended.append)
    monkeypatch.setattr(watchdog, "kill_children", lambda: None)
    monkeypatch.setattr(watchdog, "GRACE_S", 0.0)
    for rank in (0, 2):
        ranks = Ranks(rank=rank, world_size=3, local_rank=rank, device=torch.device("cpu"))
        guard = watchdog.Watchdog(tmp_path, job, ranks, phases, 600.0)
        alarm = guard._roster.alarm()
        assert alarm is not None
        guard._follow(alarm)
    assert ended == [2, 2]
    lines = capsys.readouterr().err.splitlines()
    assert lines == ([] if said else ["error: rank 1 failed: no such thing"])


def test_a_fault_is_said_though_it_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "faults.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        log_fault(tmp_path, "failure", "error: the reason")
    assert capsys.readouterr().err == "error: the reason\n"


def test_what_is_left_of_an_earlier_job_raises_no_alarm(tmp_path: Path) -> None:
    old = Roster(tmp_path, Roster.reset(tmp_path), 1, Phases())
    old.sign()
    new = Roster(tmp_path, Roster.reset(tmp_path), 0, Phases())
    new.sign()
    with pytest.raises(FileNotFoundError):
        old.raise_alarm("failure", 1, "of the earlier job")
    assert new.alarm() is None and new.others() == []
    assert new.raise_alarm("hang", 3, "of this one") and old.alarm() is None
