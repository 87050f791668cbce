"""What launchers leave in the environment: understood, or refused in a line; no process starts."""

from __future__ import annotations

import signal
import socket

import pytest

from ultramem_ds.cli import main
from ultramem_ds.utils.environment import World, adopt, first_host, rank_told, world_of
from ultramem_ds.utils.hostfile import parse_hostfile
from ultramem_ds.utils.launch import parse_launch
from ultramem_ds.utils.ports import free_port, is_taken

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node-0", "MASTER_PORT": "29511",
}  # fmt: skip
SRUN = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "8", "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "gpu[07-08]",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "3",
}  # fmt: skip
INTEL_MPI = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def place(world: World) -> tuple[int, int, int, int, str]:
    return (world.rank, world.size, world.local_rank, world.local_size, world.master_addr)


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


def test_launchers_that_are_understood() -> None:
    assert place(world_of(TORCHRUN)) == (3, 4, 1, 2, "node-0")
    assert world_of(TORCHRUN).master_port == 29511
    assert place(world_of(SRUN)) == (5, 8, 1, 4, "gpu07")
    assert place(world_of(OPEN_MPI)) == (2, 3, 2, 3, "127.0.0.1")
    assert place(world_of(INTEL_MPI)) == (1, 2, 1, 2, "127.0.0.1")
    # What srun starts may start ranks itself: those count.
    assert place(world_of({**SRUN, **TORCHRUN})) == (3, 4, 1, 2, "node-0")
    only = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
    assert place(world_of(only)) == (1, 2, 1, 2, "127.0.0.1")
    several = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "node-0"}
    assert world_of(several).master_addr == "node-0"


def test_one_process() -> None:
    for environ in (
        {},
        {"MASTER_ADDR": "node-0", "MASTER_PORT": "29500"},  # exported for the scripts
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"},  # a shell of salloc
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
    ):
        assert world_of(environ) == World(), environ


def test_ranks_of_a_job_agree_on_a_port_and_jobs_on_different_ones() -> None:
    ports = {
        (job, rank): world_of({**SRUN, "SLURM_JOB_ID": job, "SLURM_PROCID": rank}).master_port
        for job in ("4711", "4712")
        for rank in ("0", "5")
    }
    assert ports["4711", "0"] == ports["4711", "5"] != ports["4712", "0"]
    assert all(10_000 <= port < 29_000 for port in ports.values())
    assert world_of({**SRUN, "MASTER_PORT": "29512"}).master_port == 29512
    assert world_of(OPEN_MPI).master_port == 29500
    assert world_of({**OPEN_MPI, "PMIX_NAMESPACE": "prterun-a-1@1"}).master_port != 29500


HALF = [
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "without LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
    ({"RANK": "1"}, "RANK=1 without WORLD_SIZE"),
    ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1 without RANK"),
    (without(TORCHRUN, "MASTER_PORT"), "without MASTER_PORT"),
    ({**TORCHRUN, "RANK": "4"}, "rank 4 of 4"),
    ({**TORCHRUN, "RANK": "first"}, "RANK='first'"),
    ({**TORCHRUN, "WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
    ({**TORCHRUN, "MASTER_PORT": "70000"}, "MASTER_PORT=70000 must be at most 65535"),
    (without(SRUN, "SLURM_STEP_ID"), "started without srun: write srun before the command"),
    (without(SRUN, "SLURM_JOB_NODELIST"), "set MASTER_ADDR"),
    (without(SRUN, "SLURM_LOCALID"), "SLURM_LOCALID"),
    (without(OPEN_MPI, "OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_SIZE missing"),
    ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "mpirun -x MASTER_ADDR=HOST"),
    ({**INTEL_MPI, "MPI_LOCALNRANKS": "1"}, "mpirun -genv MASTER_ADDR HOST"),
    ({**TORCHRUN, "LOCAL_WORLD_SIZE": "two"}, "LOCAL_WORLD_SIZE='two'"),
    (without(INTEL_MPI, "MPI_LOCALRANKID"), "MPI_LOCALRANKID missing"),
]  # fmt: skip


@pytest.mark.parametrize(("environ", "message"), HALF, ids=[message for _, message in HALF])
def test_half_a_world_is_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        world_of(environ)
    assert message in str(refusal.value)


def test_the_world_is_written_in_one_language() -> None:
    environ = dict(SRUN)
    world = adopt(environ)
    assert place(world_of(without(environ, *SRUN))) == place(world)
    alone: dict[str, str] = {}
    assert adopt(alone) == World() and not alone
    assert rank_told({}) == rank_told({"SLURM_PROCID": "0"}) == 0
    assert rank_told(SRUN) and rank_told(OPEN_MPI) and rank_told(TORCHRUN)


@pytest.mark.parametrize(
    ("names", "first"),
    [
        ("node-1", "node-1"),
        ("gpu[07-08]", "gpu07"),
        ("a[3,5-9],b1", "a3"),
        ("rack[1-2]n[04-09]-ib,c", "rack1n04-ib"),
        ("x,y[1-2]", "x"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_list(names: str, first: str) -> None:
    assert first_host(names) == first


def test_hostfiles() -> None:
    text = "# mine\nlocalhost slots=2\n\nworker-1   slots = 8 # fast\n"
    assert parse_hostfile(text, "h") == {"localhost": 2, "worker-1": 8}
    for text, message in (
        ("localhost slots=2\nlocalhost lots=2\n", "h, line 2: 'localhost lots=2'"),
        ("localhost slots=2\nlocalhost slots=2\n", "localhost stands there twice"),
        ("", "names no machine"),
        ("# nothing\n", "names no machine"),
        ("localhost\n", "write localhost slots=8"),
        ("localhost slots=0\n", "line 1"),
        ("localhost slots=two\n", "line 1"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_hostfile(text, "h")


def test_ports() -> None:
    port = free_port()
    assert not is_taken(port)
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))
        server.listen()
        assert is_taken(port)  # of one interface only: a rank would listen on all
        with pytest.raises(ValueError, match=f"port {port} .* is taken.*set MASTER_PORT"):
            parse_launch(["--num_gpus", "2", "--master_port", str(port)])
        node_0 = ["--node_rank", "0", "--make_hostfile", "2:1", "--master_port", str(port)]
        with pytest.raises(ValueError, match="the same on all nodes"):
            parse_launch(node_0)
        assert parse_launch(["--node_rank", "1", *node_0[2:]]).port == port  # another machine's


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num_gpus 0", "NPROC=0"),
        ("--num_gpus two", "NPROC=two"),
        ("--node_rank 0 --make_hostfile 2:0", "NPROC=0"),
        ("--node_rank 0 --make_hostfile x:1", "NNODES=x"),
        ("--node_rank 2 --make_hostfile 2:1", "NODE_RANK=2 must be below NNODES=2"),
        ("--num_gpus 1 --master_port http", "MASTER_PORT=http"),
        ("--hostfile nowhere", "hostfile nowhere does not exist"),
    ],
)
def test_launches_that_are_refused(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_launch(words.split())


def test_a_port_is_chosen_where_one_machine_knows_it() -> None:
    alone = parse_launch(["--num_gpus", "2", "--master_port", "", "--module", "x"])
    assert alone.port != 29500 and alone.arguments(None)[-4:] == [
        "--num_gpus",
        "2",
        "--module",
        "x",
    ]
    one = parse_launch(["--node_rank", "0", "--make_hostfile", "1:2", "--master_port", ""])
    assert one.port != 29500 and one.made_hosts == {"node-0": 2}
    several = parse_launch(["--node_rank", "1", "--make_hostfile", "2:2", "--master_port", ""])
    assert several.port == 29500


def test_an_error_of_another_rank_alone_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(main, "_AFTER_RANK_0_S", 0.01)
    for rank, begin in (("0", "error: "), ("3", "error on rank 3: ")):
        monkeypatch.setenv("RANK", rank)
        before = signal.getsignal(signal.SIGTERM)
        try:
            assert main.main(["count", "--preset", "no-such"]) == 2
        finally:
            signal.signal(signal.SIGTERM, before)
        assert capsys.readouterr().err.startswith(begin)
