"""How fast ranks talk: the collectives of every axis, through the mesh's own groups, and machines two by two.

axes     all groups of an axis at once, as in a step: bytes a rank gives by the time it takes, and the time of 8 bytes
links    every machine sends to the one that comes 1, 2, 3 places after it, half of them at a time: of what it sends,
         and of what it gets, the best. So a slow machine is known from those that it talks to
"""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from parallel.collectives import all_gather, all_reduce, all_to_all
from parallel.mesh import Mesh
from parallel.topology import Axis
from parallel.traffic import Traffic

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

Row = tuple[str, list[int], float]  # what was measured, the ranks that it is between, value
# How each axis talks most.
AXES = {
    Axis.pp: (Axis.pp, Traffic.pipeline),
    Axis.dp: (Axis.replicas, Traffic.data),
    Axis.tp: (Axis.tp, Traffic.tensor),
    Axis.ep: (Axis.ep, Traffic.tokens),
}
ALMOST_NOTHING = 2  # float32 values: what is timed is the way
CPU_VALUES, DEVICE_VALUES = 2**18, 2**24  # float32 values that a rank gives: 1 MiB, 64 MiB
TIMES = 5  # of which the shortest counts: what else a machine does for a moment is not to be its fault
PLACES = 3  # machines that each sends to


def read_axes(mesh: Mesh) -> Iterator[Row]:
    """Of every axis with more than one rank, as this rank sees it. Collective."""
    import torch

    for axis, (along, traffic) in AXES.items():
        if mesh.degree(axis) == 1:
            continue
        group = mesh.group(along, traffic)
        ranks = list(mesh.topology.group(mesh.rank, along))
        for name, values in (("latency", ALMOST_NOTHING), ("bandwidth", _count_values(mesh))):
            values = -(-values // len(ranks)) * len(ranks)
            content = torch.ones(values, device=mesh.device)
            talk = _choose(axis, content, group, ranks, mesh.rank)
            seconds = _time(talk, group, mesh.device)
            yield f"{name} of {axis}", ranks, seconds * 1e6 if name == "latency" else content.nbytes / 1e6 / seconds


def read_links(mesh: Mesh, leaders: Sequence[int]) -> Iterator[Row]:
    """Between the first ranks of machines: what each got, by who sent it. Collective over all ranks."""
    import torch
    import torch.distributed as dist

    control = mesh.group(Axis.world, Traffic.control)
    content = torch.ones(_count_values(mesh), device=mesh.device)
    room = torch.empty_like(content)
    for apart in range(1, min(PLACES, len(leaders) - 1) + 1):
        # Half of them send at a time: what a slow link sends holds up the receipts for what it gets.
        for turn, half in product(range(3), range(2)):
            dist.barrier(control)
            if mesh.rank not in leaders:
                continue
            place = leaders.index(mesh.rank)
            after, before = (place + apart) % len(leaders), (place - apart) % len(leaders)
            sends, gets = place // apart % 2 == half, before // apart % 2 == half
            started = time.perf_counter()
            posts = [dist.P2POp(dist.isend, content, leaders[after], control)] if sends else []
            posts += [dist.P2POp(dist.irecv, room, leaders[before], control)] if gets else []
            works = dist.batch_isend_irecv(posts) if posts else []
            for work in reversed(works):  # what it gets first: that is timed
                work.wait()
                _settle(mesh.device)
                if gets and work is works[-1] and turn:  # the first makes the connection
                    yield (
                        "link",
                        [leaders[before], mesh.rank],
                        content.nbytes * 8 / 1e9 / (time.perf_counter() - started),
                    )


def _choose(
    axis: Axis, content: "torch.Tensor", group: "dist.ProcessGroup", ranks: Sequence[int], rank: int
) -> Callable[[], Any]:
    """What an axis does with its messages, all of it done when it returns."""
    if axis is Axis.tp:
        return lambda: all_gather(content, group).wait()
    if axis is Axis.dp:
        return lambda: all_reduce(content, group).wait()
    if axis is Axis.ep:
        share = [len(content) // len(ranks)] * len(ranks)
        return lambda: all_to_all(content[:, None], share, share, group).wait()
    import torch.distributed as dist

    place, room = ranks.index(rank), content.clone()
    after, before = ranks[(place + 1) % len(ranks)], ranks[place - 1]

    def pass_on() -> None:
        for work in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, content, after, group), dist.P2POp(dist.irecv, room, before, group)]
        ):
            work.wait()

    return pass_on


def _time(talk: Callable[[], Any], group: "dist.ProcessGroup", device: "torch.device") -> float:
    import torch.distributed as dist

    times: list[float] = []
    for _ in range(1 + TIMES):  # the first makes connections
        dist.barrier(group)
        started = time.perf_counter()
        talk()
        _settle(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _count_values(mesh: Mesh) -> int:
    return CPU_VALUES if mesh.device.type == "cpu" else DEVICE_VALUES


def _settle(device: "torch.device") -> None:
    if device.type != "cpu":
        import torch

        torch.accelerator.synchronize()
