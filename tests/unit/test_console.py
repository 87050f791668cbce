"""Libraries' lines from Python and from C++ go to a file, ours to the console."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dist.launching import environment
from ultramem_ds.utils.console import Sorter, is_library_line

RANK = """
import ctypes, logging, os, sys, warnings
from pathlib import Path
from ultramem_ds.utils.console import libraries_apart

libc = ctypes.CDLL(None)

def library(text):
    libc.printf(f"{text} printf\\n".encode()); libc.fflush(None)
    os.write(2, f"{text} write\\n".encode())
    logging.getLogger("library").warning("%s log", text)
    warnings.warn(f"{text} warning")

with libraries_apart(verbose=sys.argv[1] == "verbose") as output:
    handler = logging.StreamHandler(sys.stdout)  # at import, as DeepSpeed's
    logging.getLogger("library").addHandler(handler)
    if output is not None:
        output.speak()
    print("ours")
    library("before")
    if sys.argv[1] == "refuse":
        raise ValueError("no run directory yet")
    if output is not None:
        output.keep(Path(sys.argv[2]) / "rank.log")
    library("after")
    print("ours on stderr", file=sys.stderr)
    if sys.argv[1] == "fail":
        raise RuntimeError("unexpected")
print("the console is back")
os.write(1, b"for all\\n")
"""
KINDS = ("printf", "write", "log", "warning")


def run(tmp_path: Path, how: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RANK, how, str(tmp_path / "run")],
        env=environment(),
        capture_output=True,
        text=True,
    )


def test_a_rank_shows_its_own_lines(tmp_path: Path) -> None:
    done = run(tmp_path, "quiet")
    assert done.stdout.splitlines() == ["ours", "the console is back", "for all"]
    assert done.stderr.splitlines() == ["ours on stderr"]
    kept = (tmp_path / "run" / "rank.log").read_text()
    assert [f"{when} {kind}" in kept for when in ("before", "after") for kind in KINDS] == [
        True
    ] * 8


def test_verbose_shows_everything(tmp_path: Path) -> None:
    done = run(tmp_path, "verbose")
    assert all(f"before {kind}" in done.stdout + done.stderr for kind in KINDS)
    assert not (tmp_path / "run").exists()


def test_a_refusal_leaves_nothing_and_an_unexpected_error_says_where_to_look(
    tmp_path: Path,
) -> None:
    refused = run(tmp_path, "refuse")
    assert "before" not in refused.stdout + refused.stderr and not (tmp_path / "run").exists()
    failed = run(tmp_path, "fail")
    assert f"libraries: see {tmp_path / 'run' / 'rank.log'}" in failed.stderr
    assert "RuntimeError: unexpected" in failed.stderr


def test_a_rank_outlives_its_console(tmp_path: Path) -> None:
    """A killed launcher takes the pipe with it; what is printed then goes nowhere."""
    script = RANK.replace('print("ours")', 'print("ours"); sys.stdin.read()')
    rank = subprocess.Popen(
        [sys.executable, "-c", script, "quiet", str(tmp_path / "run")],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert rank.stdout is not None and rank.stderr is not None and rank.stdin is not None
    assert rank.stdout.readline() == b"ours\n"
    rank.stdout.close()
    rank.stderr.close()
    rank.stdin.close()
    rank.wait()
    assert "after printf" in (tmp_path / "run" / "rank.log").read_text()


def test_a_full_disk_does_not_take_the_error_with_it(tmp_path: Path) -> None:
    """Where libraries' lines find no room the console is given back all the same."""
    script = """
import sys, tempfile
tempfile.TemporaryFile = lambda mode: open("/dev/full", "r+b", buffering=0)
from ultramem_ds.cli import main, train
main.importlib.import_module = lambda name: train
def run(arguments, libraries):
    libraries.speak()
    sys.__stdout__.write("a library's line\\n")
    raise ValueError("what is wrong")
train._run = run
words = "train --preset p --data d --run-dir r".split()
sys.exit(main.main(words))
"""
    buffered = {k: v for k, v in environment().items() if k != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=buffered, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, "error: what is wrong\n")


def test_a_console_that_is_full_for_now(tmp_path: Path) -> None:
    """A line is longer than a non-blocking pipe: what does not fit waits for the reader."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    line = b"error: " + b"x" * 1_000_000 + b"\n"
    sorter = Sorter(io.BytesIO(line), writer, [])
    found = b""
    while len(found) < len(line):
        found += os.read(reader, 1 << 16)
    sorter.finish(10.0)
    assert found == line and sorter.shown == 1
    os.close(reader), os.close(writer)


LIBRARY = [
    "[2026-11-25 23:32:58,672] [INFO] [launch.py:152:main] WORLD INFO DICT: {}",
    "worker-1: [2026-11-25 23:32:58,672] [WARNING] [real_accelerator.py:213:x] Setting",
    "[W1125 23:00:04.101 ProcessGroupNCCL.cpp:1505] Warning: destroy_process_group()",
    "[rank0]:[W1125 23:00:04.101 ProcessGroupGloo.cpp:1] x",
    "W1125 23:00:04.101000 1234 torch/distributed/run.py:766]",
    "[Gloo] Rank 0 is connected to 1 peer ranks.",
]
OURS = [
    "dense-debug step      1/8  loss 4.1581  grad_norm 4.106  lr 6.00e-04",
    "WARNING: runs/x/metrics.jsonl cannot be written",
    "error: port 29500 of this machine is taken",
    "Traceback (most recent call last):",
]


@pytest.mark.parametrize("line", LIBRARY)
def test_lines_of_libraries(line: str) -> None:
    assert is_library_line(line.encode())


def test_a_launcher_sorts_its_ranks_lines(tmp_path: Path) -> None:
    source = io.BytesIO("\n".join([*LIBRARY[:3], *OURS, *LIBRARY[3:]]).encode())
    kept: list[bytes] = []
    with open(tmp_path / "console", "wb") as console:
        Sorter(source, os.dup(console.fileno()), kept).finish(10.0)
    assert (tmp_path / "console").read_text().splitlines() == OURS
    assert [line.decode().rstrip("\n") for line in kept] == LIBRARY


def test_a_pipe_whose_reader_has_left_is_no_error():
    """``ultramem-ds count | head`` and the like."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "ultramem_ds", "count"]
    found = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (found.stderr, found.returncode) == (b"", 128 + signal.SIGPIPE)
