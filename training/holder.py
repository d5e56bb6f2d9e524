"""Who holds a run's devices, and since when: what lies between two attempts of one holder is paid for.

Slurm's job, in one of its lives      SLURM_JOB_ID, SLURM_RESTART_COUNT
the program that starts the ranks     torchrun, mpirun, or our own: the parent of a rank
this process                          where it is the only one
"""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class Holder(NamedTuple):
    """Who it is."""

    name: str  # the same for all attempts of the same holder
    since: int  # ns of the machine's clock
    started: int  # that this process was


def find_holder(environment: Mapping[str, str]) -> Holder:
    """That of a process with this ``environment``."""
    own = read_start(os.getpid())
    launched = "RANK" in environment or "SLURM_PROCID" in environment
    process = os.getppid() if launched else os.getpid()
    since = read_start(process)
    if job := environment.get("SLURM_JOB_ID"):
        return Holder(f"job {job}.{environment.get('SLURM_RESTART_COUNT', '0')}", since, own)
    return Holder(f"process {process} of {socket.gethostname()}, {_read_ticks(process)}", since, own)


def read_start(process: int) -> int:
    """When a process of this machine was started, ns of its clock; now, where that is not known."""
    now, ticks = time.time_ns(), _read_ticks(process)
    if ticks is None:
        return now
    uptime = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
    return now - int((uptime - ticks / os.sysconf("SC_CLK_TCK")) * 1e9)


def _read_ticks(process: int) -> int | None:
    """The same, in ticks since the machine was started."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None
