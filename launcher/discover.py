"""Which rank this process is: one pure function of the environment that a launcher has given it.

    torchrun    RANK, WORLD_SIZE                LOCAL_RANK, LOCAL_WORLD_SIZE    GROUP_RANK     MASTER_ADDR, MASTER_PORT
    mpirun      OMPI_COMM_WORLD_RANK, _SIZE     .._LOCAL_RANK, .._LOCAL_SIZE    MPI knows      MPI says
                PMI_RANK, PMI_SIZE              MPI_LOCALRANKID, _LOCALNRANKS
    srun        SLURM_PROCID,                   SLURM_LOCALID,                  SLURM_NODEID   the first machine of
                SLURM_STEP_NUM_TASKS            SLURM_STEP_TASKS_PER_NODE                      SLURM_STEP_NODELIST
                which of how many               on its machine                  the machine    where ranks meet

The first of them whose variables are there counts: a launcher that is started by another one leaves the other's in
place. A batch script and the shell of an allocation have some of Slurm's, but are no tasks of a step, so that what is
typed there starts its own ranks, as does a step of one task. MASTER_ADDR and MASTER_PORT, where they are set, count
under every launcher.
"""

import re
import zlib
from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple

PORTS = range(10_000, 30_000)  # below those that systems hand out by themselves


class Backend(StrEnum):
    """Who started the ranks."""

    torchrun = "torchrun"  # and this program itself, by the same API
    mpi = "mpi"
    slurm = "slurm"


class Rank(NamedTuple):
    """One process of several that train together."""

    rank: int
    world: int  # ranks in all
    local: int  # its place among the ranks of its machine
    here: int  # ranks of its machine
    node: int | None = 0  # number of its machine; None: MPI is to be asked
    address: str | None = None  # host:port, where the ranks meet; None: MPI is to be asked
    backend: Backend = Backend.torchrun

    def variables(self) -> dict[str, str]:
        """What torchrun would say of it, in the environment. ``node`` and ``address`` are known."""
        assert self.address is not None
        host, _, port = self.address.rpartition(":")
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": str(self.local),
            "LOCAL_WORLD_SIZE": str(self.here),
            "GROUP_RANK": str(self.node),
            "MASTER_ADDR": host,
            "MASTER_PORT": port,
        }


def discover(environment: Mapping[str, str]) -> Rank | None:
    """The rank that ``environment`` makes this process, or None where nobody started several.

    Raises ValueError for variables that are missing, are no numbers, or contradict each other.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        found = _of_torchrun(environment)
    elif "OMPI_COMM_WORLD_RANK" in environment:
        found = _of_mpi(environment, "OMPI_COMM_WORLD_", ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
    elif "MPI_LOCALRANKID" in environment:
        found = _of_mpi(environment, "", ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"))
    elif "SLURM_STEP_NUM_TASKS" in environment:
        found = _of_slurm(environment)
    else:
        return None
    names = _NAMES[found.backend]
    if found.rank >= found.world:
        raise ValueError(f"{names[0]}={found.rank} in the environment must be below {names[1]}={found.world}")
    if found.local >= found.here:
        raise ValueError(f"{names[2]}={found.local} in the environment must be below {names[3]}={found.here}")
    return None if found.world == 1 and found.backend is not Backend.torchrun else found


def refuse(what: str, environment: Mapping[str, str]) -> None:
    """Raises ValueError where each of several processes would do ``what``."""
    if (rank := discover(environment)) is not None and rank.world > 1:
        raise ValueError(
            f"{what} must be typed once, and this is one of {rank.world} processes that {_PROGRAMS[rank.backend]} has "
            "started: call it outside"
        )


_PROGRAMS = {Backend.torchrun: "torchrun", Backend.mpi: "mpirun", Backend.slurm: "srun"}
_NAMES = {
    Backend.torchrun: ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    Backend.mpi: ("the rank of MPI", "its size", "the local rank of MPI", "its local size"),
    Backend.slurm: ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}


def _of_torchrun(environment: Mapping[str, str]) -> Rank:
    rank, world = _read(environment, "RANK"), _read(environment, "WORLD_SIZE")
    local, here = _read(environment, "LOCAL_RANK", rank), _read(environment, "LOCAL_WORLD_SIZE", world)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise ValueError(
                f"{name} is missing in the environment, though RANK={rank} and WORLD_SIZE={world} are there"
            )
    node = _read(environment, "GROUP_RANK", rank // here)
    return Rank(rank, world, local, here, node, _read_address(environment))


def _of_mpi(environment: Mapping[str, str], prefix: str, names: tuple[str, ...]) -> Rank:
    rank, world, local, here = (_read(environment, prefix + name) for name in names)
    return Rank(rank, world, local, here, None, _read_address(environment), Backend.mpi)


def _of_slurm(environment: Mapping[str, str]) -> Rank:
    rank, world = _read(environment, "SLURM_PROCID"), _read(environment, "SLURM_STEP_NUM_TASKS")
    local, node = _read(environment, "SLURM_LOCALID"), _read(environment, "SLURM_NODEID")
    counts = count_tasks(environment.get("SLURM_STEP_TASKS_PER_NODE", str(world)))
    if node >= len(counts):
        raise ValueError(
            f"SLURM_NODEID={node} in the environment must be below {len(counts)}, the nodes of "
            "SLURM_STEP_TASKS_PER_NODE"
        )
    check_neighbours(rank, local, sum(counts[:node]), "srun --distribution=block")
    address = _read_address(environment)
    if address is None:
        hosts = environment.get("SLURM_STEP_NODELIST", "")
        if not hosts:
            raise ValueError("SLURM_STEP_NODELIST is missing in the environment, though SLURM_PROCID is there")
        address = f"{name_first(hosts)}:{choose_port(environment)}"
    return Rank(rank, world, local, counts[node], node, address, Backend.slurm)


def check_neighbours(rank: int, local: int, first: int, instead: str) -> None:
    """Raises ValueError where ranks of a machine, the first of which is ``first``, do not follow each other."""
    if rank != first + local:
        raise ValueError(
            f"rank {rank} must be rank {first + local}, as number {local} on its machine: ranks of a machine have "
            f"numbers in a row; start them by {instead}"
        )


def count_tasks(text: str) -> list[int]:
    """Slurm's tasks of every node: ``2(x3),1`` is [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part, re.ASCII)
        if found is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE={text} in the environment cannot be read")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def name_first(hosts: str) -> str:
    """The first of Slurm's list of hosts: ``n[003-7,9],m1`` is n003."""
    first = re.split(r",(?![^\[]*\])", hosts)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def choose_port(environment: Mapping[str, str]) -> int:
    """The same for all tasks of a step, which cannot ask each other yet; another one for another step or attempt."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    key = ".".join(environment.get(name, "0") for name in names)
    return PORTS[zlib.crc32(key.encode()) % len(PORTS)]


def _read_address(environment: Mapping[str, str]) -> str | None:
    host, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    return f"{host}:{port}" if host and port else None


def _read(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    """The number in a variable; ``default`` is what it is on a single machine."""
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None:
        raise ValueError(
            f"{name} is missing in the environment, though other variables of a launcher are there: start with "
            "torchrun, srun or mpirun, or unset those of RANK, WORLD_SIZE and SLURM_STEP_NUM_TASKS that are there"
        )
    if not text.isdecimal() or (int(text) == 0 and name.endswith(("SIZE", "TASKS", "NRANKS"))):
        raise ValueError(f"{name}={text} in the environment must be a number")
    return int(text)
