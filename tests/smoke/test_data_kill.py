"""`prepare` killed with SIGKILL at random moments, then finished: as if nothing had happened."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.unit.advice import says
from tests.unit.data_corpus import contents, write_redpajama, write_tokenizer

KILLS = 10


@pytest.mark.slow
def test_killed_ten_times_and_finished(tmp_path):
    for number in range(6):
        write_redpajama(tmp_path / "data" / str(number), documents=60)
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    output = tmp_path / "out"

    def start(output: Path, workers: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "ultramem_ds", "prepare", "--input", tmp_path / "data"]
        command += ["--output", output, "--tokenizer", tokenizer, "--workers", workers]
        return subprocess.Popen(
            list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    begin_s = time.monotonic()
    assert start(tmp_path / "undisturbed", 1).wait(timeout=120) == 0
    whole_s = time.monotonic() - begin_s
    expected = contents(tmp_path / "undisturbed")

    moments = random.Random(0)
    kills = 0
    while kills < KILLS:
        process = start(output, 1 + kills % 2)
        time.sleep(moments.uniform(0.3, 0.8) * whole_s)
        if process.poll() is None:
            orphans = psutil.Process(process.pid).children()
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            # Workers notice that their parent is gone.
            assert not psutil.wait_procs(orphans, timeout=20)[1]
            continue
        assert process.returncode == 0
        assert contents(output) == expected
        shutil.rmtree(output)  # the interrupted runs got to the end: once more from the beginning
    assert start(output, 2).wait(timeout=120) == 0
    assert contents(output) == expected


DIED = says("a worker process died, perhaps for lack of memory: use fewer --workers; finished "
            "units are kept, repeat the command to go on")  # fmt: skip


def test_a_killed_worker_is_an_error_not_a_hang(tmp_path):
    write_redpajama(tmp_path / "data", documents=2000)
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    command = [sys.executable, "-m", "ultramem_ds", "prepare", "--input", tmp_path / "data"]
    command += ["--output", tmp_path / "out", "--tokenizer", tokenizer, "--workers", 2]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    deadline_s = time.monotonic() + 60
    victims: list[psutil.Process] = []
    while not victims and time.monotonic() < deadline_s and process.poll() is None:
        children = psutil.Process(process.pid).children()
        victims = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        time.sleep(0.01)
    os.kill(victims[0].pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    DIED.values(errors.splitlines()[-1])
    fewer = [*map(str, command[:-1]), "1"]  # as the message says: fewer, and again
    assert subprocess.run(fewer, stderr=subprocess.DEVNULL, timeout=60).returncode == 0
    assert (tmp_path / "out" / "manifest.json").exists()
