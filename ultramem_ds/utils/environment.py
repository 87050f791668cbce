"""Which rank of which world this process is: what launchers say in the environment.

Understood are PyTorch's variables (``torchrun``, ``deepspeed``), SLURM's (``srun``), Open MPI's
and those of MPICH's and Intel MPI's ``mpirun``. Parsing is pure; :func:`adopt` writes the answer
back in PyTorch's variables, which is what everything behind it reads. A start that looks
distributed and is not complete is refused: it would train as many worlds of one rank.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

DEFAULT_PORT = 29500  # of MASTER_PORT where no job number tells another
TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_OPEN_MPI = tuple(f"OMPI_COMM_WORLD_{n}" for n in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
_HYDRA = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
# Without these a process is alone, whatever else of a launcher's is there.
_TELLING = (TORCH[:3], ("SLURM_NTASKS",), _OPEN_MPI, _HYDRA)
# Ports of jobs: below those that systems give out, apart from the default.
_FIRST_PORT, _NUM_PORTS = 10_000, 19_000


@dataclass(frozen=True, kw_only=True)
class World:
    """Where this process stands, and where its world meets.

    Attributes:
        rank: number among all processes.
        size: processes.
        local_rank: number on this machine.
        local_size: processes on this machine.
        master_addr: machine of rank 0; empty for one process, which meets nobody.
        master_port: port there; 0 for one process.
        started_by: who says so, for messages.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    master_addr: str = ""
    master_port: int = 0
    started_by: str = "plain Python"


def world_of(environ: Mapping[str, str]) -> World:
    """The world that an environment describes.

    Raises:
        ValueError: it describes a part of one, or a number is none; says what to do.
    """
    if any(name in environ for name in TORCH[:3]):
        return _torch(environ)
    for found in (_slurm(environ), _open_mpi(environ), _hydra(environ)):
        if found is not None:
            return found
    return World()


def _torch(environ: Mapping[str, str]) -> World:
    size = _integer(environ, "WORLD_SIZE", 1)
    rank = _integer(environ, "RANK", 0)
    local_rank = _integer(environ, "LOCAL_RANK", 0)
    local_size = _integer(environ, "LOCAL_WORLD_SIZE", 1) or _integer(environ, "LOCAL_SIZE", 1) or 1
    alone = size == 1 and rank in (None, 0) and local_rank in (None, 0)
    missing = [name for name in TORCH if not environ.get(name)]
    if missing and not alone:
        there = ", ".join(f"{name}={environ[name]}" for name in TORCH if environ.get(name))
        raise ValueError(
            f"half of a launcher's environment: {there} without {', '.join(missing)}; start ranks "
            "with launch/one_node.sh, torchrun, srun or mpirun, set all five, or unset them to "
            "run one process"
        )
    if missing:
        return World()
    assert rank is not None and size is not None and local_rank is not None
    return _checked(
        World(
            rank=rank,
            size=size,
            local_rank=local_rank,
            local_size=local_size,
            master_addr=environ["MASTER_ADDR"],
            master_port=_port(environ, ""),
            started_by="RANK and WORLD_SIZE",
        )
    )


def _slurm(environ: Mapping[str, str]) -> World | None:
    size = _integer(environ, "SLURM_NTASKS", 1)
    if size is None or "SLURM_PROCID" not in environ or size == 1:
        return None
    if "SLURM_JOB_ID" in environ and "SLURM_STEP_ID" not in environ:
        raise ValueError(
            f"a SLURM job of {size} tasks, but this process was started without srun: write srun "
            "before the command, use sbatch launch/slurm.sh, or unset SLURM_NTASKS to run one "
            "process"
        )
    rank, local_rank = (_integer(environ, f"SLURM_{name}", 0) for name in ("PROCID", "LOCALID"))
    if rank is None or local_rank is None:
        raise ValueError("SLURM_PROCID without SLURM_LOCALID: not an environment of srun")
    nodes = (
        _integer(environ, "SLURM_STEP_NUM_NODES", 1) or _integer(environ, "SLURM_NNODES", 1) or 1
    )
    names = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    address = environ.get("MASTER_ADDR") or ("127.0.0.1" if nodes == 1 else first_host(names))
    if not address:
        raise ValueError(
            f"a SLURM step on {nodes} nodes without SLURM_JOB_NODELIST: set MASTER_ADDR to the "
            "machine of task 0"
        )
    job = environ.get("SLURM_JOB_ID", "")
    return _checked(
        World(
            rank=rank,
            size=size,
            local_rank=local_rank,
            local_size=-(-size // nodes),
            master_addr=address,
            master_port=_port(environ, f"{job}.{environ.get('SLURM_STEP_ID', '')}" if job else ""),
            started_by="srun",
        )
    )


def _open_mpi(environ: Mapping[str, str]) -> World | None:
    who, option = "Open MPI's mpirun", "-x MASTER_ADDR=HOST"
    return _mpi(environ, who, _OPEN_MPI, environ.get("PMIX_NAMESPACE", ""), option)


def _hydra(environ: Mapping[str, str]) -> World | None:
    return _mpi(environ, "mpirun", _HYDRA, "", "-genv MASTER_ADDR HOST")


def _mpi(
    environ: Mapping[str, str], who: str, names: tuple[str, ...], job: str, option: str
) -> World | None:
    rank, size, local_rank, local_size = (
        _integer(environ, name, least) for name, least in zip(names, (0, 1, 0, 1))
    )
    if (size is None and rank is None) or size == 1:
        return None
    if rank is None or size is None or local_rank is None or local_size is None:
        missing = [name for name in names if name not in environ]
        raise ValueError(
            f"half of {who}'s environment: {', '.join(missing)} missing; start ranks with mpirun, "
            "or unset the others to run one process"
        )
    address = environ.get("MASTER_ADDR") or ("127.0.0.1" if local_size == size else "")
    if not address:
        raise ValueError(
            f"{who} started {size} ranks on several machines: tell them where rank 0 is, "
            f"mpirun {option} ..."
        )
    return _checked(
        World(
            rank=rank,
            size=size,
            local_rank=local_rank,
            local_size=local_size,
            master_addr=address,
            master_port=_port(environ, job),
            started_by=who,
        )
    )


def _checked(world: World) -> World:
    if world.rank >= world.size:
        raise ValueError(
            f"rank {world.rank} of {world.size} ({world.started_by}): ranks count from 0"
        )
    return world


def first_host(names: str) -> str:
    """The first of a SLURM node list such as ``node[03-08,12],gpu-a``; empty for none."""
    depth, end = 0, len(names)
    for at, character in enumerate(names):
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            end = at
            break
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", names[:end])


def _port(environ: Mapping[str, str], job: str) -> int:
    """``MASTER_PORT``, or one that all ranks of a job compute from its name."""
    given = _integer(environ, "MASTER_PORT", 1)
    if given is not None:
        if given > 65_535:
            raise ValueError(f"MASTER_PORT={given} must be at most 65535")
        return given
    return _FIRST_PORT + zlib.crc32(job.encode()) % _NUM_PORTS if job else DEFAULT_PORT


def _integer(environ: Mapping[str, str], name: str, least: int) -> int | None:
    text = environ.get(name)
    if text is None or text == "":
        return None
    if text.isdigit() and int(text) >= least:
        return int(text)
    what = f"{name}={text!r} in the environment must be a whole number from {least} on"
    if name == "MASTER_PORT":
        raise ValueError(f"{what}: set MASTER_PORT to a free port, the same for all ranks")
    family = next((t for t in _TELLING if name[:5] == t[0][:5] or name in t), _TELLING[0])
    there = [each for each in family if environ.get(each)]
    raise ValueError(
        f"{what}; a launcher sets it, to run one process unset {', '.join(there) or name}"
    )


def adopt(environ: MutableMapping[str, str] = os.environ) -> World:
    """Read the world and write it in PyTorch's variables, for all that reads those.

    One process alone is given none: it meets itself at a port that is found when it does.

    Raises:
        ValueError: see :func:`world_of`.
    """
    world = world_of(environ)
    if world.size > 1:
        environ.update(
            RANK=str(world.rank),
            WORLD_SIZE=str(world.size),
            LOCAL_RANK=str(world.local_rank),
            LOCAL_WORLD_SIZE=str(world.local_size),
            MASTER_ADDR=world.master_addr,
            MASTER_PORT=str(world.master_port),
        )
    return world


def rank_told(environ: Mapping[str, str] = os.environ) -> int:
    """The number that a launcher gave this process; 0 without one."""
    numbers = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
    number = next((environ[name] for name in numbers if environ.get(name)), "0")
    return int(number) if number.isdigit() else 0
