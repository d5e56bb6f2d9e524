"""What makes a process a rank, whoever started it: its environment, its signals, its interface, its cores.

discover() --> enter --> where ranks meet is known; RANK, WORLD_SIZE, ... are as torchrun sets them
                         a request to stop is kept until the loop can hear it
           --> share_cores, once they have met: how many each has, and which
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from typing import Any, NoReturn, TextIO, cast

from configs.network import INTERFACE, NetworkConfig
from launcher.console import Plain
from launcher.discover import Backend, Rank
from launcher.network import LOOPBACK, find_interface
from training.interrupt import LAUNCHER


@contextmanager
def enter(rank: Rank, network: NetworkConfig) -> Iterator[Rank]:
    """Makes this process ``rank``; with all that there is to know of it. Collective under mpirun.

    Raises ValueError as ``launcher.mpi.meet``.
    """
    keep_requests()
    if rank.backend is Backend.slurm:
        # Slurm says so before it ends a task by force. Under torchrun it means that another rank is dead: end now.
        signal.signal(signal.SIGTERM, _stop_soon)
    store: Any = None
    if rank.backend is Backend.mpi:
        from launcher import mpi

        alone = rank.address is None
        rank, store = mpi.meet(rank)
        if alone:
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # rank 0 has it already
    os.environ.update(rank.variables() | network.variables())
    if network.interface is None:
        _set_interface(rank)
    # mpirun gives each rank a terminal that nobody sits at.
    shown = redirect_stdout(cast(TextIO, Plain(sys.stdout))) if rank.backend is Backend.mpi else nullcontext()
    with shown:
        yield rank
    del store


def keep_requests() -> None:
    """Requests to stop wait until they can be heard: training/interrupt.py."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [LAUNCHER])


def leave(code: int) -> NoReturn:
    """Ends the process of a rank, all of whose work is done or lost.

    Not by way of Python's finalisation: a daemon thread that comes back from a collective meanwhile would be ended
    inside frames of C++, which may not be unwound, and SIGABRT would be the exit code of a rank that had done well.
    """
    if (mpi := sys.modules.get("mpi4py.MPI")) is not None:
        mpi.Finalize()  # which mpirun waits for
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def stay_inside() -> None:
    """All that this process sends stays on this machine."""
    os.environ |= dict.fromkeys(INTERFACE, LOOPBACK)


def _stop_soon(number: int, frame: object) -> None:
    os.kill(os.getpid(), LAUNCHER)


def _set_interface(rank: Rank) -> None:
    """What leads to the first rank, where the environment does not say. Left alone, gloo takes what this machine's name
    stands for, which on Debian's machines is an address that no other one reaches.
    """
    if rank.address is None or any(name in os.environ for name in INTERFACE):
        return
    found = find_interface(rank.address.rpartition(":")[0])
    if found is not None and (found != LOOPBACK or rank.here == rank.world):
        os.environ.update(dict.fromkeys(INTERFACE, found))
