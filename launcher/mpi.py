"""Ranks that mpirun started: MPI says which machine each is on, and takes word of where they meet to all of them.

Nothing else goes through MPI: once ranks have met, they talk as under every launcher.
"""

import socket
from typing import TYPE_CHECKING, Any

from launcher.discover import Rank, check_neighbours
from launcher.network import find_address, listen

if TYPE_CHECKING:
    from torch.distributed import TCPStore

LONGEST = 256  # bytes of a name


def meet(rank: Rank) -> tuple[Rank, "TCPStore | None"]:
    """``rank`` with what only MPI knows, and on the first rank the store where all meet, to be kept. Collective.

    Raises ValueError where mpi4py finds no library of MPI, or another one than that of the mpirun that is running.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"mpirun: mpi4py finds no library of MPI here: {error}; see docs/ranks.md") from None
    comm = MPI.COMM_WORLD
    if (comm.Get_rank(), comm.Get_size()) != (rank.rank, rank.world):
        raise ValueError(
            f"mpirun says rank {rank.rank} of {rank.world}, mpi4py {comm.Get_rank()} of {comm.Get_size()}: their "
            "libraries of MPI differ; set MPI4PY_LIBMPI to the libmpi.so of this mpirun"
        )
    names = _gather(comm, socket.gethostname())
    machines = list(dict.fromkeys(names))
    check_neighbours(rank.rank, rank.local, names.index(names[rank.rank]), "mpirun --map-by slot")
    store = listen(find_address(machines[1:])) if rank.rank == 0 and rank.address is None else None
    address = _gather(comm, f"{store.host}:{store.port}" if store else "")[0] or rank.address
    return rank._replace(node=machines.index(names[rank.rank]), address=address), store


def _gather(comm: Any, text: str) -> list[str]:
    """What every rank says, by rank: as bytes, for mpi4py would pickle objects."""
    said = bytearray(LONGEST * comm.Get_size())
    comm.Allgather(text.encode()[:LONGEST].ljust(LONGEST, b"\0"), said)
    return [said[at : at + LONGEST].rstrip(b"\0").decode(errors="replace") for at in range(0, len(said), LONGEST)]
