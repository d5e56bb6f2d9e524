"""The process groups of a run: made once, all at the start, passed explicitly. Nothing else holds one.

Each kind of traffic has groups of its own, because two collectives on one group share its connections: a small message
behind a bulk one waits for it. Groups of the same ranks for the same traffic are one group.
"""

from datetime import timedelta
from enum import StrEnum

import torch
import torch.distributed as dist

from parallel.topology import Axis, Topology


class Traffic(StrEnum):
    """What travels."""

    tensor = "tensor"  # activations between shards of a sequence
    tokens = "tokens"  # rows to experts and back
    counts = "counts"  # how many rows
    data = "data"  # gradients and weights
    control = "control"  # statistics, agreements


GROUPS = (
    (Axis.tp, Traffic.tensor),
    (Axis.sequence, Traffic.control),
    (Axis.ep, Traffic.tokens),
    (Axis.ep, Traffic.counts),
    (Axis.stage, Traffic.data),
    (Axis.replicas, Traffic.data),
    (Axis.edp, Traffic.data),
    (Axis.dp, Traffic.control),
    (Axis.stage, Traffic.control),
    (Axis.world, Traffic.control),
)

# ROCm builds of torch call their devices cuda and RCCL nccl.
BACKENDS = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl", "npu": "hccl"}


class Mesh:
    """The groups of one rank."""

    def __init__(self, topology: Topology, device: torch.device, timeout: timedelta | None = None) -> None:
        """Collective over all ranks: each makes its own groups, in the same order. ``dist`` is initialised.

        Raises ValueError if the number of ranks is not the topology's.
        """
        if dist.get_world_size() != topology.world:
            raise ValueError(f"the topology has {topology.world} ranks, but {dist.get_world_size()} were started")
        self.topology, self.device, self.rank = topology, device, dist.get_rank()
        made: dict[tuple[tuple[int, ...], Traffic], dist.ProcessGroup] = {}
        self._groups: dict[tuple[Axis, Traffic], dist.ProcessGroup] = {}
        for axis, traffic in GROUPS:
            ranks = topology.group(self.rank, axis)
            if (ranks, traffic) not in made:
                # With local synchronisation a rank makes the groups that it is in, not those of the whole world.
                made[ranks, traffic] = dist.new_group(
                    list(ranks), timeout=timeout, use_local_synchronization=True, group_desc=f"{axis} {traffic}"
                )
            self._groups[axis, traffic] = made[ranks, traffic]

    def group(self, axis: Axis, traffic: Traffic) -> dist.ProcessGroup:
        """The group for ``traffic`` along ``axis``; the pair is one of ``GROUPS``."""
        return self._groups[axis, traffic]

    def degree(self, axis: Axis) -> int:
        """Ranks along ``axis``."""
        return self.topology.degree(axis)

    def coordinate(self, axis: Axis) -> int:
        """This rank's place along ``axis``."""
        return self.topology.coordinate(self.rank, axis)
