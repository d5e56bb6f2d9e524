"""The groups of a mesh on real ranks: each carries its own ranks' numbers, and nobody else's."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks

from parallel.mesh import Mesh, connect, disconnect
from parallel.placement import HOLDERS, Placement, cut, holders
from parallel.topology import Topology
from parallel.traffic import GROUPS

CPU = torch.device("cpu")


def add_ranks(mesh: Mesh) -> list[int]:
    """The sum of the ranks of every group."""
    sums = []
    for axis, traffic in GROUPS:
        tensor = torch.tensor([mesh.rank])
        dist.all_reduce(tensor, group=mesh.group(axis, traffic))
        sums.append(int(tensor))
    return sums


def add_all(rank: int, world: int, topology: Topology) -> list[int]:
    return add_ranks(Mesh(topology, CPU))


def reconnect(rank: int, world: int, folder: Path) -> list[int]:
    """Two runs after each other in one process; the second is left to the caller to end."""
    disconnect()
    connect(CPU, rank, world, folder / "first")
    add_ranks(Mesh(Topology(dp=world), CPU))
    disconnect()
    connect(CPU, rank, world, folder / "second")
    return add_ranks(Mesh(Topology(tp=world), CPU))


@pytest.mark.parametrize(
    "topology", [Topology(dp=2, tp=2, ep=2), Topology(dp=3, tp=2, ep=3), Topology(pp=2, dp=2, tp=2, ep=4)], ids=str
)
def test_every_group_sums_over_its_ranks(topology: Topology) -> None:
    sums = run_ranks(add_all, topology.world, topology)
    for rank, found in enumerate(sums):
        assert found == [sum(topology.group(rank, axis)) for axis, _ in GROUPS]


SETS = {(0, 3), (1, 2)}  # pipeline ranks that hold a parameter together


def add_holders(rank: int, world: int, topology: Topology) -> list[tuple[int, int]]:
    """The sum of the ranks that hold the same part, for each kind of parameter, and what it should be."""
    mesh, found = Mesh(topology, CPU), []
    mesh.share(SETS)
    own = next(across for across in SETS if rank // topology.stage_size in across)
    for axis in HOLDERS:
        for across in (own, ()):
            tensor, placement = torch.tensor([rank]), Placement(axis)
            shard = cut((8, 8), placement, topology, rank)._replace(across=across)
            dist.all_reduce(tensor, group=mesh.holders(shard))
            found.append((int(tensor), sum(holders(placement, topology, rank, across))))
    return found


@pytest.mark.parametrize("topology", [Topology(pp=4), Topology(pp=4, tp=2, ep=2), Topology(pp=4, dp=2, ep=2)], ids=str)
def test_pipeline_ranks_that_share_a_parameter_sum_over_all_who_hold_it(topology: Topology) -> None:
    for rank, found in enumerate(run_ranks(add_holders, topology.world, topology)):
        assert all(total == expected for total, expected in found), rank
        assert len(found) == 2 * len(HOLDERS), rank


def test_ranks_connect_through_a_file(tmp_path: Path) -> None:
    expected = [sum(Topology(tp=3).group(0, axis)) for axis, _ in GROUPS]
    assert run_ranks(reconnect, 3, tmp_path)[0] == expected
