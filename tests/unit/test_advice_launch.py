"""Advice about starting ranks, followed: the environment, hostfiles, ports, the scripts."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.dist.launching import ROOT, environment
from tests.unit.advice import Claim, ask, no_training, says
from tests.unit.bad_inputs import FITS, Scene
from tests.unit.test_environment import INTEL_MPI, OPEN_MPI, SRUN, TORCHRUN, without
from tests.unit.test_launch_scripts import launch
from ultramem_ds.utils.environment import TORCH, World, world_of
from ultramem_ds.utils.hostfile import parse_hostfile, read_hostfile
from ultramem_ds.utils.launch import parse_launch
from ultramem_ds.utils.ports import free_port
from ultramem_ds.zero import offload, rendezvous, runtime


def refused(claim: Claim, environ: dict[str, str]) -> tuple[str, ...]:
    with pytest.raises(ValueError) as refusal:
        world_of(environ)
    return claim.values(refusal.value)


HALF = says("half of a launcher's environment: {} without {}; start ranks with launch/one_node.sh, "
            "torchrun, srun or mpirun, set all five, or unset them to run one process")  # fmt: skip


def test_half_a_launchers_environment() -> None:
    half = without(TORCHRUN, "MASTER_PORT", "LOCAL_RANK")
    there, missing = refused(HALF, half)
    assert world_of({**half, **dict.fromkeys(missing.split(", "), "1")}).size == 4
    assert world_of(without(half, *re.findall(r"(\w+)=", there))) == World()
    assert set(TORCH) == {*re.findall(r"(\w+)=", there), *missing.split(", ")}
    for launched in (TORCHRUN, SRUN, OPEN_MPI):  # torchrun, srun or mpirun set what is needed
        assert world_of(launched).size > 1


SLURM = says("a SLURM job of {} tasks, but this process was started without srun: write srun "
             "before the command, use sbatch launch/slurm.sh, or unset SLURM_NTASKS to run one "
             "process")  # fmt: skip
NODES = says("a SLURM step on {} nodes without SLURM_JOB_NODELIST: set MASTER_ADDR to the machine "
             "of task 0")  # fmt: skip


def test_slurm() -> None:
    batch = without(SRUN, "SLURM_STEP_ID")
    refused(SLURM, batch)
    assert world_of({**batch, "SLURM_STEP_ID": "0"}).size == 8  # as srun sets it
    assert world_of(without(batch, "SLURM_NTASKS")) == World()
    text = (ROOT / "launch" / "slurm.sh").read_text()
    assert "#SBATCH" in text and "srun " in text
    anonymous = without(SRUN, "SLURM_JOB_NODELIST")
    refused(NODES, anonymous)
    assert world_of({**anonymous, "MASTER_ADDR": "a"}).size == 8


HALF_MPI = says("half of {}'s environment: {} missing; start ranks with mpirun, or unset the "
                "others to run one process")  # fmt: skip
SEVERAL = says("{} started {} ranks on several machines: tell them where rank 0 is, mpirun {} ...")


def test_mpi() -> None:
    for environ, gone in ((OPEN_MPI, "OMPI_COMM_WORLD_SIZE"), (INTEL_MPI, "MPI_LOCALRANKID")):
        half = without(environ, gone)
        assert refused(HALF_MPI, half)[1] == gone
        assert world_of(environ).size > 1
        assert world_of(without(half, *environ)) == World()
    apart = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    option = refused(SEVERAL, apart)[2].split()
    assert option[0] == "-x"  # Open MPI: -x NAME=VALUE
    name, _, value = option[1].partition("=")
    assert world_of({**apart, name: value}).master_addr == value
    apart = {**INTEL_MPI, "MPI_LOCALNRANKS": "1"}
    option = refused(SEVERAL, apart)[2].split()
    assert option[0] == "-genv"  # Hydra: -genv NAME VALUE
    assert world_of({**apart, option[1]: option[2]}).master_addr == option[2]


NUMBER = says("{}; a launcher sets it, to run one process unset {}")
PORT = says("{}: set MASTER_PORT to a free port, the same for all ranks")


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        (TORCHRUN, "RANK"), (TORCHRUN, "WORLD_SIZE"), (TORCHRUN, "LOCAL_RANK"),
        (TORCHRUN, "LOCAL_WORLD_SIZE"), ({}, "WORLD_SIZE"), (SRUN, "SLURM_NTASKS"),
        (SRUN, "SLURM_LOCALID"), (SRUN, "SLURM_NNODES"), (OPEN_MPI, "OMPI_COMM_WORLD_RANK"),
        (OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE"), (INTEL_MPI, "PMI_SIZE"),
        (INTEL_MPI, "MPI_LOCALRANKID"),
    ],
)  # fmt: skip
def test_numbers_that_are_none(environ: dict[str, str], name: str) -> None:
    broken = {**environ, name: "many"}
    names = refused(NUMBER, broken)[1].split(", ")
    assert world_of(without(broken, *names)) == World()


def test_ports_that_are_none() -> None:
    broken = {**TORCHRUN, "MASTER_PORT": "http"}
    refused(PORT, broken)
    assert world_of({**broken, "MASTER_PORT": str(free_port())}).size == 4


def test_through_the_command(prepared: Path, tmp_path: Path) -> None:
    """Unset in the environment of a command, which then trains."""
    scene = Scene(tmp_path, prepared, prepared)
    with no_training():
        command = scene.train(*FITS)
        assert "unset WORLD_SIZE" in ask(command, WORLD_SIZE="two").line
        assert ask(command).code == 0


LINE = says("hostfile {}, line {}: {} is not a machine and its ranks; write {}")
TWICE = says("{} stands there twice; write it once, with all its slots")
NO_FILE = says("hostfile {} does not exist; a line for each machine: worker-1 slots=8")
EMPTY = says("hostfile {} names no machine; a line for each: worker-1 slots=8")


def test_hostfiles(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refusal:
        parse_hostfile("gpu-1 slots=2\ngpu-2\n", "h")
    written = LINE.values(refusal.value)[3]
    assert parse_hostfile(f"gpu-1 slots=2\n{written}\n", "h") == {"gpu-1": 2, "gpu-2": 8}
    with pytest.raises(ValueError) as refusal:
        parse_hostfile("gpu-1 slots=2\ngpu-1 slots=2\n", "h")
    TWICE.values(refusal.value)
    assert parse_hostfile("gpu-1 slots=4\n", "h") == {"gpu-1": 4}
    hosts = tmp_path / "hosts"
    for claim in (NO_FILE, EMPTY):
        with pytest.raises(ValueError) as refusal:
            read_hostfile(hosts)
        claim.values(refusal.value)
        hosts.write_text("# nothing\n")
    hosts.write_text(str(refusal.value).rpartition(": ")[2] + "\n")
    assert read_hostfile(hosts) == {"worker-1": 8}


PDSH = says("DeepSpeed starts the machines of a hostfile through pdsh, which is not installed "
            "(Debian and Ubuntu: apt-get install pdsh); or start every node by hand with "
            "NODE_RANK, NNODES, MASTER_ADDR and NPROC")  # fmt: skip
MULTI = ROOT / "launch" / "multi_node.sh"


def _multi_node(tmp_path: Path, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """The script with a Python that says what it is asked."""
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\necho "$*"\n')
    python.chmod(0o755)
    ours = {"HOSTFILE", "NPROC", "NODE_RANK", "NNODES", "MASTER_ADDR", "MASTER_PORT"}
    kept = {k: v for k, v in os.environ.items() if k not in ours}
    return subprocess.run(
        ["bash", str(MULTI), *words], env={**kept, "PYTHON": str(python), **settings},
        capture_output=True, text=True,
    )  # fmt: skip


def test_nodes_without_pdsh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("worker-1 slots=8\nworker-2 slots=8\n")
    with monkeypatch.context() as patch, pytest.raises(ValueError) as refusal:
        patch.setenv("PATH", str(tmp_path))
        parse_launch(["--hostfile", str(hosts)])
    PDSH.values(refusal.value)
    by_hand = {"NODE_RANK": "1", "NNODES": "2", "MASTER_ADDR": "worker-1", "NPROC": "8"}
    assert set(by_hand) <= set(re.findall(r"[A-Z_]+", str(refusal.value)))
    done = _multi_node(tmp_path, "train", **by_hand)
    assert parse_launch(_launcher_words_with_port(done.stdout)).made_hosts == {
        "node-0": 8, "node-1": 8,
    }  # fmt: skip
    (tmp_path / "pdsh").write_text("#!/bin/sh\n")
    (tmp_path / "pdsh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert parse_launch(["--hostfile", str(hosts)]).by_ssh


def _launcher_words_with_port(said: str) -> list[str]:
    """The launcher's arguments; ``--master_port`` with an empty value loses it in ``$*``."""
    words = shlex.split(said)[2:]
    at = words.index("--master_port")
    if words[at + 1].startswith("--"):
        words.insert(at + 1, "")
    return words


def test_what_the_scripts_say(tmp_path: Path) -> None:
    """Theirs are not messages of the package: every line that they print is here."""
    hosts = tmp_path / "hosts"
    hosts.write_text("worker-1 slots=8\n")
    refused = _multi_node(tmp_path, "train", HOSTFILE=str(hosts), NPROC="8")
    assert refused.returncode == 2 and "NPROC=8 beside HOSTFILE" in refused.stderr
    assert refused.stderr.rstrip().endswith("unset it")
    assert _multi_node(tmp_path, "train", HOSTFILE=str(hosts)).returncode == 0
    refused = _multi_node(tmp_path, "train")
    assert refused.returncode != 0
    names = re.findall(r"[A-Z]+_?[A-Z]+", refused.stderr.split("or ")[-1])
    assert names == ["NODE_RANK", "NNODES", "MASTER_ADDR", "NPROC"]
    assert _multi_node(tmp_path, "train", **dict.fromkeys(names, "1")).returncode == 0
    refused = launch(tmp_path, NPROC="many")
    assert refused.returncode == 2 and "from 1 on" in refused.stderr
    assert launch(tmp_path, NPROC="1").returncode == 0
    refused = launch(tmp_path, CUDA_VISIBLE_DEVICES="4,5", NPROC="8")
    shown = re.findall(r"shows (\d+) GPUs", refused.stderr)[0]
    assert launch(tmp_path, CUDA_VISIBLE_DEVICES="4,5", NPROC=shown).returncode == 0
    said = [
        line
        for script in sorted((ROOT / "launch").glob("*.sh"))
        for line in script.read_text().splitlines()
        if re.search(r"\becho\b|:\?[^}]", line)
    ]
    assert len(said) == 5, f"a new message of a script: follow it here\n{said}"


def test_slurms_script_elsewhere(tmp_path: Path) -> None:
    """SLURM runs a copy of the script; it finds the rest where the job was submitted."""
    copy = tmp_path / "job" / "slurm_script"
    copy.parent.mkdir()
    copy.write_text((ROOT / "launch" / "slurm.sh").read_text())
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for name, body in (("scontrol", "echo worker-1"), ("srun", 'echo "$*"')):
        (bin_dir / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (bin_dir / name).chmod(0o755)
    names = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "worker-1", "SLURM_NNODES": "1",
             "PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}"}  # fmt: skip

    def submit(directory: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(copy), "train"], cwd=directory, capture_output=True, text=True,
            env={**os.environ, **names, "SLURM_SUBMIT_DIR": str(directory)},
        )  # fmt: skip

    refused = submit(tmp_path)
    assert refused.returncode == 2 and "submit this script from the repository's root" in (
        refused.stderr
    )
    done = submit(ROOT)
    assert done.returncode == 0 and "multi_node.sh train" in done.stdout, done.stderr


TAKEN = says("port {} of this machine is taken by another program: set MASTER_PORT to a free one, "
             "the same on all nodes")  # fmt: skip
TAKEN_THERE = says("port {} of {} is taken by another program: set MASTER_PORT to a free one, the "
                   "same for all ranks")  # fmt: skip


def test_ports_that_are_taken() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(ValueError) as refusal:
            parse_launch(["--num_gpus", "2", "--master_port", str(port)])
        assert TAKEN.values(refusal.value) == (str(port),)
        free = str(free_port())
        assert parse_launch(["--num_gpus", "2", "--master_port", free]).port == int(free)
        world = World(size=2, master_addr="127.0.0.1", master_port=port)
        with pytest.raises(ValueError) as refusal, rendezvous.meeting_point(world):
            pass
        assert TAKEN_THERE.values(refusal.value) == (str(port), "127.0.0.1")
        world = World(size=2, master_addr="127.0.0.1", master_port=int(free))
        with rendezvous.meeting_point(world):
            pass


GPUS = says("rank {} is number {} on a machine that shows {} GPUs: start as many ranks as it has")


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError) as refusal:
        runtime._cuda_device(World(rank=2, size=3, local_rank=2))
    count = int(GPUS.values(refusal.value)[2])
    for rank in range(count):
        device = runtime._cuda_device(World(rank=rank, size=count, local_rank=rank))
        assert device == torch.device("cuda", rank)


LIBAIO = says("offload to NVMe needs libaio and a C compiler: install it with headers (Debian and "
              "Ubuntu: libaio-dev) or use ds_configs/ultramem_zero3_cpu_offload.json")  # fmt: skip
NO_PATH = says("the DeepSpeed JSON offloads to NVMe without a path: set "
               "zero_optimization.offload_optimizer.nvme_path to a directory of a local "
               "disk")  # fmt: skip
IN_USE = says("{} is in use by another run; give each run its own")
UNBUILDABLE = says("offload needs a C++ compiler and ninja; use ds_configs/ultramem_zero3.json "
                   "without them")  # fmt: skip


def _config(name: str) -> dict[str, object]:
    from ultramem_ds.config.deepspeed import load_deepspeed_json

    return load_deepspeed_json(Path(name), "ultramem")


def test_offload_that_a_machine_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that are named instead ask for nothing that is missing."""
    nvme = _config("ds_configs/ultramem_zero3_nvme_offload.json")
    built: list[str] = []
    monkeypatch.setattr(offload, "build_op", lambda builder: built.append(builder.name))
    monkeypatch.setattr(offload, "buildable_ops", lambda: {"async_io": False, "cpu_adam": True})
    with pytest.raises(ValueError) as refusal:
        offload.prepare_offload(nvme, 0)
    LIBAIO.values(refusal.value)
    offload.prepare_offload(_config(re.findall(r"ds_configs/\S+", str(refusal.value))[0]), 0)
    assert built == ["cpu_adam"]
    monkeypatch.undo()

    class Broken:
        name = "cpu_adam"

        def load(self, verbose: bool) -> None:
            raise RuntimeError("no compiler")

    with pytest.raises(ValueError) as refusal:
        offload.build_op(Broken())
    UNBUILDABLE.values(refusal.value)
    named = re.findall(r"ds_configs/\w+\.json", str(refusal.value))[0]
    monkeypatch.setattr(offload, "build_op", lambda builder: pytest.fail("it is built again"))
    offload.prepare_offload(_config(named), 0)


def test_a_directory_to_swap_to(tmp_path: Path) -> None:
    nvme = _config("ds_configs/ultramem_zero3_nvme_offload.json")
    zero = nvme["zero_optimization"]
    assert isinstance(zero, dict)
    path = zero["offload_optimizer"].pop("nvme_path")
    with pytest.raises(ValueError) as refusal:
        offload.nvme_directory(nvme)
    NO_PATH.values(refusal.value)
    *sections, key = re.findall(r"set (\S+) to", str(refusal.value))[0].split(".")
    inner: dict[str, object] = nvme
    for section in sections:
        inner = inner[section]  # type: ignore[assignment]
    inner[key] = path
    assert offload.nvme_directory(nvme) == Path(path)


def test_two_runs_that_swap(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from ultramem_ds.zero.offload import claim_swap_directory\n"
        "claim_swap_directory(pathlib.Path(sys.argv[1]), 0); print('held', flush=True)\n"
        "sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(ROOT / "build" / "swap-a")], cwd=ROOT, env=environment(),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError) as refusal:
            offload.claim_swap_directory(ROOT / "build" / "swap-a", 0)
        IN_USE.values(refusal.value)
        offload.claim_swap_directory(ROOT / "build" / "swap-b", 0)
    finally:
        holder.kill()
        holder.communicate()
