"""Ranks started by other programs than our launcher: the series is that of one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import RUN_OVERRIDES
from tests.dist.launching import ROOT, environment, run_verb
from ultramem_ds.telemetry.metrics import read_lines
from ultramem_ds.utils.ports import free_port

pytestmark = pytest.mark.dist

KIND = ("train", "--preset", "dense-debug")
REST = (*RUN_OVERRIDES, "train.micro_batch_size=1", "train.max_steps=2")


def command(data: Path, run_dir: Path) -> list[str]:
    words = [*KIND, "--data", str(data), "--run-dir", str(run_dir), *REST]
    return [sys.executable, "-m", "ultramem_ds", *words]


def run_all(commands: list[list[str]], environments: list[dict[str, str]]) -> list[tuple[int, str]]:
    """Exit code and output of processes that run side by side."""
    processes = [
        subprocess.Popen(
            words, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for words, env in zip(commands, environments, strict=True)
    ]
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs)]


@pytest.fixture(scope="module")
def alone(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The series of one process."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    ((code, output),) = run_all([command(prepared, run_dir)], [environment()])
    assert code == 0, output
    return read_lines(run_dir / "metrics.jsonl")


def assert_one_run(run_dir: Path, alone: list[dict[str, float]], world_size: int) -> None:
    records = read_lines(run_dir / "metrics.jsonl")
    for one, several in zip(alone, records, strict=True):
        assert several["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert several["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    assert f'"world_size": {world_size}' in (run_dir / "summary.json").read_text()


def started_by(name: str, rank: int, size: int, port: int) -> dict[str, str]:
    """The variables of a launcher, and no others."""
    if name == "srun":
        words = {"SLURM_NTASKS": size, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}
        words |= {"SLURM_JOB_ID": port, "SLURM_STEP_ID": 0, "SLURM_NNODES": 1}
    else:
        places = {"RANK": rank, "SIZE": size, "LOCAL_RANK": rank, "LOCAL_SIZE": size}
        words = {f"OMPI_COMM_WORLD_{key}": value for key, value in places.items()}
        words["MASTER_PORT"] = port
    return environment(**{key: str(value) for key, value in words.items()})


@pytest.mark.parametrize(("name", "size"), [("srun", 4), ("mpirun", 2)])
def test_variables_of_other_launchers(
    prepared: Path, tmp_path: Path, alone: list[dict[str, float]], name: str, size: int
) -> None:
    """Processes with only SLURM's or Open MPI's variables; for srun the port is the job's."""
    environments = [started_by(name, rank, size, free_port()) for rank in range(size)]
    if name == "srun":
        environments = [{**env, "SLURM_JOB_ID": "4711"} for env in environments]
    else:
        environments = [{**e, "MASTER_PORT": environments[0]["MASTER_PORT"]} for e in environments]
    results = run_all([command(prepared, tmp_path / "run")] * size, environments)
    assert [code for code, _ in results] == [0] * size, results
    assert_one_run(tmp_path / "run", alone, size)


def test_torchrun_with_several_ranks(
    prepared: Path, tmp_path: Path, alone: list[dict[str, float]]
) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    words += ["-m", *command(prepared, tmp_path / "run")[2:]]
    ((code, output),) = run_all([words], [environment()])
    assert code == 0, output
    assert_one_run(tmp_path / "run", alone, 2)


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which another program listens."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_taken_port_is_answered_at_once(prepared: Path, tmp_path: Path, taken: int) -> None:
    """By rank 0 and by the others; through the script before anything starts."""
    environments = [started_by("mpirun", rank, 2, taken) for rank in range(2)]
    results = run_all([command(prepared, tmp_path / "run")] * 2, environments)
    assert [code for code, _ in results] == [2, 2], results
    errors = [line for _, out in results for line in out.splitlines() if "error:" in line]
    assert len(errors) == 1 and f"port {taken} of 127.0.0.1 is taken" in errors[0], results
    assert not (tmp_path / "run").exists()
    begin = time.monotonic()
    script = subprocess.run(
        ["bash", str(ROOT / "launch" / "multi_node.sh"), *KIND, "--data", str(prepared)]
        + ["--run-dir", str(tmp_path / "run"), *REST],
        env=environment(
            NODE_RANK="0", NNODES="2", MASTER_ADDR="127.0.0.1", NPROC="1", MASTER_PORT=str(taken)
        ),
        capture_output=True,
        text=True,
    )
    assert script.returncode == 2 and time.monotonic() - begin < 60
    assert script.stderr.splitlines() == [
        f"error: port {taken} of this machine is taken by another program: set MASTER_PORT to a "
        "free one, the same on all nodes"
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"HOSTFILE": "nowhere"}, "error: hostfile nowhere does not exist"),
        ({"HOSTFILE": "hosts", "NPROC": "2"}, "error: NPROC=2 beside HOSTFILE"),
        ({"NODE_RANK": "0", "NNODES": "1", "MASTER_ADDR": "a", "NPROC": "0"}, "error: NPROC=0"),
    ],
)
def test_scripts_refuse_worlds_of_one(settings: dict[str, str], message: str) -> None:
    script = subprocess.run(
        ["bash", str(ROOT / "launch" / "multi_node.sh"), *KIND],
        env=environment(**settings),
        capture_output=True,
        text=True,
    )
    assert script.returncode == 2 and script.stderr.startswith(message)


def test_one_node_without_ranks() -> None:
    script = subprocess.run(
        ["bash", str(ROOT / "launch" / "one_node.sh"), *KIND],
        env={**environment(NPROC="0"), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert script.returncode == 2 and script.stderr.startswith("error: NPROC=0")


def test_half_an_environment_is_refused_by_the_command(prepared: Path, tmp_path: Path) -> None:
    words = [*KIND, "--data", str(prepared), "--run-dir", str(tmp_path / "run"), *REST]
    refused = run_verb(*words, RANK="0", WORLD_SIZE="2")
    assert refused.returncode == 2
    half = "error: half of a launcher's environment: RANK=0, WORLD_SIZE=2 without LOCAL_RANK"
    assert refused.stderr.startswith(half)
