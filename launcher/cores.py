"""Which cores of its machine are a rank's: an equal share of those that it and others may use, near each other.

Slurm, mpirun      may have given each rank cores of its own: these it keeps
else               all ranks of a machine may use the same ones, and share them, by NUMA domain
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.discover import Rank
from training.config import Affinity

if TYPE_CHECKING:
    from torch.distributed import Store

NODES = Path("/sys/devices/system/node")


def share_cores(store: "Store", rank: Rank, affinity: Affinity) -> int:
    """How many cores are this rank's, to which it and its threads keep where ``affinity`` says so. Collective."""
    if not hasattr(os, "sched_getaffinity"):
        return max(1, (os.cpu_count() or 1) // rank.here)
    store.set(f"cores {rank.rank}", json.dumps([rank.node, rank.local, sorted(os.sched_getaffinity(0))]))
    everywhere = (json.loads(store.get(f"cores {other}")) for other in range(rank.world))
    here = {local: cores for node, local, cores in everywhere if node == rank.node}
    domains = read_domains()
    mine = divide(here, rank.local, domains)
    if affinity is Affinity.on or (affinity is Affinity.auto and len(set(domains.values())) > 1):
        os.sched_setaffinity(0, mine)
    return len(mine)


def divide(here: Mapping[int, Sequence[int]], local: int, domains: Mapping[int, int]) -> list[int]:
    """The cores of rank ``local`` of a machine, whose processes may use the cores ``here`` so far, by local rank.

    Those that may use the same ones share these, in equal parts that lie together; ``domains``: the NUMA domain of a
    core. A rank whose cores are its own keeps them. With fewer cores than ranks, several have the same one.
    """
    mine = sorted(here[local], key=lambda core: (domains.get(core, 0), core))
    sharing = sorted(other for other, cores in here.items() if set(cores) == set(mine))
    place, count = sharing.index(local), len(sharing)
    if len(mine) < count:
        return [mine[place % len(mine)]]
    return sorted(mine[place * len(mine) // count : (place + 1) * len(mine) // count])


def read_domains(nodes: Path = NODES) -> dict[int, int]:
    """The NUMA domain of every core of this machine, those of machines of one domain all the same; as Linux has it."""
    found: dict[int, int] = {}
    for path in nodes.glob("node*/cpulist"):
        for part in filter(None, path.read_text().strip().split(",")):
            first, _, last = part.partition("-")
            found |= dict.fromkeys(range(int(first), int(last or first) + 1), int(path.parent.name[4:]))
    return found
