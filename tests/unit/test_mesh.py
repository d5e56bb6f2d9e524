"""The groups of a rank, in worlds of up to 2048 ranks: torch's fake backend makes groups and moves nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_topology import TOPOLOGIES
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel.mesh import BACKENDS, Mesh, connect, disconnect
from parallel.topology import Axis, Topology
from parallel.traffic import GROUPS, Traffic

CPU = torch.device("cpu")
DEEPSEEK = Topology(pp=16, dp=128, ep=64)


@contextmanager
def pretend(rank: int, topology: Topology) -> Iterator[Mesh]:
    """The mesh of one rank of a world that is not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=topology.world)
    try:
        yield Mesh(topology, CPU)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("topology", [*TOPOLOGIES[:40], DEEPSEEK, Topology(pp=4, dp=32, cp=2, tp=8, ep=64)], ids=str)
def test_groups_are_those_of_the_topology(topology: Topology) -> None:
    rank = topology.world * 2 // 3
    with pretend(rank, topology) as mesh:
        for axis, traffic in GROUPS:
            ranks = dist.get_process_group_ranks(mesh.group(axis, traffic))
            assert tuple(ranks) == topology.group(rank, axis)
            assert dist.get_rank(mesh.group(axis, traffic)) == mesh.coordinate(axis) == ranks.index(rank)
            assert len(ranks) == mesh.degree(axis)
        assert (mesh.topology, mesh.rank, mesh.device) == (topology, rank, CPU)


@pytest.mark.parametrize(
    ("topology", "groups"),
    [
        # One a traffic: all axes are this rank alone.
        (Topology(), 6),
        # One a traffic, and for control two: sequence is this rank alone, the others are all of them.
        (Topology(dp=4), 7),
        # The groups of DeepSeek-V3's layout: dp, replicas and stage are the same ranks.
        (DEEPSEEK, 9),
        # Nothing is equal: world, stage, dp and sequence for control; stage, replicas and edp for data.
        (Topology(pp=2, dp=2, cp=2, tp=2, ep=4), 11),
        # tp and ep are the same ranks, and still three groups, for three kinds of traffic.
        (Topology(dp=2, tp=2, ep=2), 9),
    ],
    ids=str,
)
def test_equal_groups_for_the_same_traffic_are_made_once(topology: Topology, groups: int) -> None:
    with pretend(0, topology) as mesh:
        made = {mesh.group(axis, traffic) for axis, traffic in GROUPS}
        assert len(made) == groups
        assert len(dist.distributed_c10d._world.pg_map) == groups + 1, "and the world's own"
        for axis, traffic in GROUPS:
            for other, same in GROUPS:
                equal = traffic is same and topology.group(0, axis) == topology.group(0, other)
                assert (mesh.group(axis, traffic) is mesh.group(other, same)) == equal


def test_kinds_of_traffic_share_no_group() -> None:
    for topology in TOPOLOGIES[:40]:
        with pretend(0, topology) as mesh:
            owners: dict[dist.ProcessGroup, set[Traffic]] = {}
            for axis, traffic in GROUPS:
                owners.setdefault(mesh.group(axis, traffic), set()).add(traffic)
            assert all(len(kinds) == 1 for kinds in owners.values()), topology


def test_the_ranks_of_a_group_find_each_other() -> None:
    """They meet under the group's name, which each makes up by itself: the same for all of them, and for no others."""
    for topology in [topology for topology in TOPOLOGIES if topology.world <= 12][:25]:
        names: dict[tuple[Traffic, tuple[int, ...]], set[str]] = {}
        for rank in range(topology.world):
            with pretend(rank, topology) as mesh:
                for axis, traffic in GROUPS:
                    key = traffic, topology.group(rank, axis)
                    names.setdefault(key, set()).add(mesh.group(axis, traffic).group_name)
        assert all(len(found) == 1 for found in names.values()), topology
        assert len(set.union(*names.values())) == len(names), topology


def test_a_world_of_another_size_is_refused() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=6)
    try:
        with pytest.raises(ValueError, match=r"the topology has 4 ranks, but 6 were started"):
            Mesh(Topology(dp=4), CPU)
    finally:
        dist.destroy_process_group()


def test_only_what_the_table_lists_is_there() -> None:
    with pretend(0, Topology()) as mesh, pytest.raises(KeyError):
        mesh.group(Axis.tp, Traffic.tokens)


def work() -> None:
    """Every group of a rank that is alone carries something."""
    mesh = Mesh(Topology(), CPU)
    assert dist.get_backend() == "gloo"
    for axis, traffic in GROUPS:
        tensor = torch.tensor([3.0])
        dist.all_reduce(tensor, group=mesh.group(axis, traffic))
        assert tensor.item() == 3
    disconnect()
    assert not dist.is_initialized()


def test_a_process_alone_connects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    for _ in range(2):
        connect(CPU)
        work()


def test_a_process_connects_through_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    connect(CPU)
    work()


def test_a_process_connects_through_a_file(tmp_path: Path) -> None:
    connect(CPU, 0, 1, tmp_path / "store", timedelta(seconds=20))
    work()


def test_a_device_without_a_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^run\.device=meta must be one of cpu, cuda, xpu, npu"):
        connect(torch.device("meta"))


def test_backends_are_those_of_torch() -> None:
    """torch says which backend is for which device; it has none for an npu, whose plugin brings its own."""
    for device, backend in dist.Backend.default_device_backend_map.items():
        assert BACKENDS.get(device, backend) == backend
    assert set(BACKENDS.values()) - set(dist.Backend.backend_list) == {"hccl"}


def test_a_node_has_the_ranks_that_a_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    connect(CPU)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert Mesh(Topology(), CPU).ranks_per_node == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert Mesh(Topology(), CPU).ranks_per_node == 8
    disconnect()
