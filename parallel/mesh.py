"""The process groups of a run: made once, all at the start, passed explicitly. Nothing else holds one.

    connect(device)  ->  Mesh(topology, device)  ->  mesh.group(Axis.ep, Traffic.tokens)  ->  disconnect()

Which groups there are is the table in parallel/traffic.py. Groups of the same ranks for the same traffic are one group.
"""

import os
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from parallel.overlap.lanes import Lanes, choose_lanes, reserve
from parallel.placement import HOLDERS, Placement, Shard, holders
from parallel.topology import Axis, Topology
from parallel.traffic import GROUPS, Traffic

# ROCm builds of torch call their devices cuda and RCCL nccl.
BACKENDS = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl", "npu": "hccl"}
# Whose reduce-scatter takes several times as long as an exchange and a sum, and adds in an order that depends on where
# a buffer is cut.
SLOW_SUMS = {"gloo"}
# Whose all-to-all serves one peer after the other, and so gets half to three quarters of what a link can carry.
SLOW_EXCHANGES = {"gloo"}


def connect(
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    store: Path | None = None,
    timeout: timedelta | None = None,
) -> None:
    """Joins this process to the ranks of its run, by the backend of its device.

    They find each other through ``store``, a fresh file in a folder that all of them see. Without one, through the
    environment, where a launcher such as torchrun has set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; else this
    process is the only one. Raises ValueError for a device that no backend is known for.
    """
    if device.type not in BACKENDS:
        raise ValueError(f"run.device={device.type} must be one of {', '.join(BACKENDS)}: no other has a backend here")
    # A rank that is bound to its device makes its connections now, not inside the first step.
    bound = None
    if device.type != "cpu":
        index = torch.accelerator.current_device_index() if device.index is None else device.index
        bound = torch.device(device.type, index)
    backend = BACKENDS[device.type]
    if store is None and {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        shared, rank, world = meet()
        dist.init_process_group(backend, store=shared, rank=rank, world_size=world, timeout=timeout, device_id=bound)
        return
    assert store is not None or world == 1
    found = dist.HashStore() if store is None else dist.FileStore(str(store), world)
    dist.init_process_group(backend, store=found, rank=rank, world_size=world, timeout=timeout, device_id=bound)


def meet() -> tuple[dist.Store, int, int]:
    """Where the ranks of a launcher such as torchrun find each other, which of them this is, and how many there are.

    A launcher that starts ranks again may keep its store: what those before them said there is not for these.
    """
    store, rank, world = next(rendezvous("env://"))
    return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store), rank, world


def sums_itself(group: dist.ProcessGroup) -> bool:
    """Whether ranks of ``group`` send summands to who needs the sum, to be added there, in the order of ranks; else
    their backend reduces and scatters.
    """
    return dist.get_backend(group) in SLOW_SUMS


def posts_itself(group: dist.ProcessGroup) -> bool:
    """Whether ranks of ``group`` send each other the parts of an all-to-all one by one; else their backend does."""
    return dist.get_backend(group) in SLOW_EXCHANGES


def disconnect() -> None:
    """Leaves, together with every other rank: one that is still talking would be cut off, and gloo would abort it."""
    dist.barrier()
    dist.destroy_process_group()


class Mesh:
    """The groups of one rank."""

    def __init__(
        self, topology: Topology, device: torch.device, timeout: timedelta | None = None, multiprocessors: int = 0
    ) -> None:
        """Collective over all ranks: each makes its own groups, in the same order. ``dist`` is initialised.

        ``multiprocessors``: how many of a GPU a collective takes at most, and products leave free; 0: no rule.
        Raises ValueError if the number of ranks is not the topology's.
        """
        if dist.get_world_size() != topology.world:
            raise ValueError(f"the topology has {topology.world} ranks, but {dist.get_world_size()} were started")
        self.topology, self.device, self.rank = topology, device, dist.get_rank()
        # What every launcher of torch says of a machine; without one, one machine has all ranks.
        self.ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", topology.world))
        self.lanes: Lanes = choose_lanes(device)
        reserve(multiprocessors, device.type)
        self._timeout, self._options = timeout, _limit(BACKENDS[device.type], multiprocessors)
        self._made: dict[tuple[tuple[int, ...], Traffic], dist.ProcessGroup] = {}
        self._groups = {key: self._make(topology.group(self.rank, key[0]), *key) for key in GROUPS}
        self._shared: dict[tuple[Axis, tuple[int, ...]], dist.ProcessGroup] = {}

    def share(self, sets: Iterable[tuple[int, ...]]) -> None:
        """Makes the groups of pipeline ranks that hold a parameter together (``Pipeline.shared``). Collective."""
        for across in sorted(sets):
            if self.coordinate(Axis.pp) in across:
                for split, axis in HOLDERS.items():
                    ranks = holders(Placement(split), self.topology, self.rank, across)
                    self._shared[axis, across] = self._make(ranks, axis, Traffic.data)
                beside = self.topology.group(self.rank, Axis.pp)
                self._shared[Axis.pp, across] = self._make(
                    tuple(beside[rank] for rank in across), Axis.pp, Traffic.data
                )

    def group(self, axis: Axis, traffic: Traffic) -> dist.ProcessGroup:
        """The group for ``traffic`` along ``axis``; the pair is one of ``GROUPS``."""
        return self._groups[axis, traffic]

    def holders(self, shard: Shard) -> dist.ProcessGroup:
        """The ranks that hold the same part of a parameter, for its gradients and weights."""
        if len(shard.across) < 2:
            return self.group(shard.placement.holders, Traffic.data)
        return self._shared[shard.placement.holders, shard.across]

    def beside(self, across: tuple[int, ...]) -> dist.ProcessGroup:
        """The ranks of this one's place in the stages of pipeline ranks ``across``. Collective over them at first."""
        pipeline = self.topology.group(self.rank, Axis.pp)
        return self._make(tuple(pipeline[rank] for rank in across), Axis.pp, Traffic.data)

    def aside(self) -> dist.ProcessGroup:
        """All ranks, by messages between their hosts and beside all others. Collective over all of them at first."""
        ranks = self.topology.group(0, Axis.world)
        if (ranks, Traffic.copies) not in self._made:
            self._made[ranks, Traffic.copies] = dist.new_group(backend="gloo", timeout=self._timeout)
        return self._made[ranks, Traffic.copies]

    def degree(self, axis: Axis) -> int:
        """Ranks along ``axis``."""
        return self.topology.degree(axis)

    def coordinate(self, axis: Axis) -> int:
        """This rank's place along ``axis``."""
        return self.topology.coordinate(self.rank, axis)

    def _make(self, ranks: tuple[int, ...], axis: Axis, traffic: Traffic) -> dist.ProcessGroup:
        if (ranks, traffic) not in self._made:
            # With local synchronisation a rank makes the groups that it is in, not those of the whole world.
            self._made[ranks, traffic] = dist.new_group(
                list(ranks),
                timeout=self._timeout,
                pg_options=self._options,
                use_local_synchronization=True,
                group_desc=f"{axis} {traffic}",
            )
        return self._made[ranks, traffic]


def _limit(backend: str, multiprocessors: int) -> Any:
    """Options of groups whose collectives take so many multiprocessors at most. They have never run on a GPU."""
    if not multiprocessors or backend != "nccl":
        return None
    options = dist.ProcessGroupNCCL.Options()
    options.config.max_ctas = multiprocessors
    return options
