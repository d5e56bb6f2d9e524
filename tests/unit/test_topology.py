"""Rank arithmetic on 600 drawn topologies, beside an oracle that reshapes ``arange`` and shares no code with it."""

from itertools import pairwise

import numpy as np
import pytest

from parallel.topology import Axis, Topology, arrange

DEGREES = (1, 1, 2, 2, 3, 4, 5, 6, 8, 16)
LARGEST = 128  # ranks
NODES = (2, 4, 8, 16)  # devices
# Along which axes of a grid the members of a group differ: [pp, dp, cp, tp] and [pp, edp, ep].
DENSE = {
    Axis.pp: (0,), Axis.dp: (1,), Axis.cp: (2,), Axis.tp: (3,),
    Axis.replicas: (1, 2), Axis.sequence: (2, 3), Axis.stage: (1, 2, 3), Axis.world: (0, 1, 2, 3),
}  # fmt: skip
EXPERT = {Axis.edp: (1,), Axis.ep: (2,)}


def draw(count: int = 600) -> list[Topology]:
    """Topologies of at most LARGEST ranks, no two alike; every ep divides its stage."""
    random = np.random.default_rng(0)
    drawn: dict[Topology, None] = {}
    while len(drawn) < count:
        pp, dp, cp, tp = random.choice(DEGREES, size=4).tolist()
        stage = dp * cp * tp
        if pp * stage <= LARGEST:
            ep = int(random.choice([degree for degree in range(1, stage + 1) if stage % degree == 0]))
            drawn[Topology(pp=pp, dp=dp, cp=cp, tp=tp, ep=ep)] = None
    return list(drawn)


TOPOLOGIES = draw()


def reshaped(topology: Topology, axis: Axis) -> list[tuple[int, ...]]:
    """The groups of ``axis``, by their first rank."""
    ranks = np.arange(topology.world)
    if axis in EXPERT:
        stage = topology.dp * topology.cp * topology.tp
        grid, moved = ranks.reshape(topology.pp, stage // topology.ep, topology.ep), EXPERT[axis]
    else:
        grid, moved = ranks.reshape(topology.pp, topology.dp, topology.cp, topology.tp), DENSE[axis]
    kept = [dim for dim in range(grid.ndim) if dim not in moved]
    size = int(np.prod([grid.shape[dim] for dim in moved]))
    return sorted(map(tuple, grid.transpose(*kept, *moved).reshape(-1, size).tolist()))


def test_the_draw_is_wide() -> None:
    assert len(TOPOLOGIES) >= 500
    for degree in ("pp", "dp", "cp", "tp", "ep", "edp"):
        assert len({getattr(topology, degree) for topology in TOPOLOGIES}) >= 8, degree
    assert sum(topology.ep > topology.tp > 1 for topology in TOPOLOGIES) > 50, "ep folded over tp and dp"
    assert sum(topology.ep % topology.tp > 0 for topology in TOPOLOGIES) > 50, "ep that no tp fits in"


def test_the_oracle_knows_every_axis() -> None:
    assert {*DENSE, *EXPERT} == set(Axis)


@pytest.mark.parametrize("axis", Axis)
def test_groups_are_those_of_the_oracle(axis: Axis) -> None:
    for topology in TOPOLOGIES:
        assert list(topology.groups(axis)) == reshaped(topology, axis), topology


@pytest.mark.parametrize("axis", Axis)
def test_every_axis_partitions_the_world(axis: Axis) -> None:
    for topology in TOPOLOGIES:
        groups = list(topology.groups(axis))
        assert sorted(rank for group in groups for rank in group) == list(range(topology.world)), topology
        assert {len(group) for group in groups} == {topology.degree(axis)}, topology


@pytest.mark.parametrize("axis", Axis)
def test_a_group_and_its_coordinates_agree(axis: Axis) -> None:
    for topology in TOPOLOGIES:
        for group in topology.groups(axis):
            assert all(first < second for first, second in pairwise(group)), topology
            for place, rank in enumerate(group):
                assert topology.group(rank, axis) == group, topology
                assert topology.coordinate(rank, axis) == place, topology


@pytest.mark.parametrize("axes", [(Axis.pp, Axis.dp, Axis.cp, Axis.tp), (Axis.pp, Axis.edp, Axis.ep)])
def test_coordinates_of_a_view_tell_ranks_apart(axes: tuple[Axis, ...]) -> None:
    for topology in TOPOLOGIES:
        places = [tuple(topology.coordinate(rank, axis) for axis in axes) for rank in range(topology.world)]
        assert places == sorted(set(places)), "the last axis varies fastest"


def test_both_views_have_the_same_ranks() -> None:
    for topology in TOPOLOGIES:
        assert topology.edp * topology.ep == topology.dp * topology.cp * topology.tp == topology.stage_size
        assert topology.world == topology.pp * topology.stage_size


def test_experts_stay_in_their_stage() -> None:
    for topology in TOPOLOGIES:
        for axis in (Axis.ep, Axis.edp, Axis.tp, Axis.replicas, Axis.sequence):
            for group in topology.groups(axis):
                assert len({topology.coordinate(rank, Axis.pp) for rank in group}) == 1, (topology, axis)
                assert set(group) <= set(topology.group(group[0], Axis.stage)), (topology, axis)


@pytest.mark.parametrize(
    ("part", "holders"),
    [(Axis.tp, Axis.replicas), (Axis.ep, Axis.edp), (Axis.sequence, Axis.dp), (Axis.stage, Axis.pp)],
)
def test_parts_and_holders_meet_in_one_rank(part: Axis, holders: Axis) -> None:
    """A stage is a table: along one axis the parts of a weight, along the other the holders of each."""
    for topology in TOPOLOGIES:
        whole = Axis.world if holders is Axis.pp else Axis.stage
        for rank in range(topology.world):
            assert set(topology.group(rank, part)) & set(topology.group(rank, holders)) == {rank}, topology
        table = {other for member in topology.group(0, part) for other in topology.group(member, holders)}
        assert table == set(topology.group(0, whole)), topology


@pytest.mark.parametrize("node", NODES)
def test_neighbours_stay_in_a_node(node: int) -> None:
    """Groups of tp and of ep that divide a node lie inside one."""
    seen = 0
    for topology in TOPOLOGIES:
        for axis in (Axis.tp, Axis.ep, Axis.sequence):
            if 1 < topology.degree(axis) <= node and node % topology.degree(axis) == 0:
                seen += 1
                for group in topology.groups(axis):
                    assert len({rank // node for rank in group}) == 1, (topology, axis)
    assert seen > 100


def test_one_rank_is_a_group_on_every_axis() -> None:
    for axis in Axis:
        assert Topology().group(0, axis) == (0,) and Topology().degree(axis) == 1


def test_the_example_of_the_page() -> None:
    topology = Topology(dp=2, tp=2, ep=2)
    places = [[topology.coordinate(rank, axis) for axis in (Axis.dp, Axis.tp, Axis.edp, Axis.ep)] for rank in range(4)]
    assert places == [[0, 0, 0, 0], [0, 1, 0, 1], [1, 0, 1, 0], [1, 1, 1, 1]]


def test_the_layout_of_deepseek_v3() -> None:
    """2048 devices: 16 stages of 128, experts over 64 of them: 8 nodes of 8 (arXiv 2412.19437, section 3.2)."""
    topology = Topology(pp=16, dp=128, ep=64)
    assert topology.world == 2048 and topology.edp == 2
    assert topology.group(1000, Axis.ep) == tuple(range(960, 1024))
    assert topology.group(1000, Axis.edp) == (936, 1000)
    assert topology.group(1000, Axis.pp) == tuple(range(1000 % 128, 2048, 128))


def test_no_rank_is_large() -> None:
    """The last rank of 16,384, against the oracle."""
    topology = Topology(pp=16, dp=64, cp=2, tp=8, ep=64)
    for axis in Axis:
        assert topology.group(16383, axis) == reshaped(topology, axis)[-1]


@pytest.mark.parametrize("axis", ["pp", "dp", "cp", "tp", "ep"])
@pytest.mark.parametrize("degree", [0, -2])
def test_a_degree_is_at_least_one(axis: str, degree: int) -> None:
    with pytest.raises(ValueError, match=rf"^parallel\.{axis}={degree} must be at least 1$"):
        Topology(**{axis: degree})


def test_ep_divides_its_stage() -> None:
    with pytest.raises(ValueError, match=r"^parallel\.ep=3 must divide dp\*cp\*tp = 4\*1\*1 = 4$"):
        Topology(dp=4, ep=3)
    with pytest.raises(ValueError, match=r"^parallel\.ep=8 must divide dp\*cp\*tp = 2\*1\*2 = 4$"):
        Topology(pp=2, dp=2, tp=2, ep=8)


def test_dp_takes_what_is_left() -> None:
    for topology in TOPOLOGIES:
        pp, cp, tp, ep = topology.pp, topology.cp, topology.tp, topology.ep
        assert arrange(topology.world, pp=pp, cp=cp, tp=tp, ep=ep) == topology
        assert arrange(topology.world, pp=pp, dp=topology.dp, cp=cp, tp=tp, ep=ep) == topology


def test_degrees_fit_the_ranks_that_are_there() -> None:
    with pytest.raises(ValueError, match=r"parallel\.pp\*cp\*tp = 1\*1\*4 = 4 must divide the number of ranks, 6"):
        arrange(6, tp=4)
    with pytest.raises(
        ValueError, match=r"parallel\.pp\*dp\*cp\*tp = 1\*2\*1\*2 = 4 must equal the number of ranks, 8"
    ):
        arrange(8, dp=2, tp=2)
    with pytest.raises(ValueError, match=r"parallel\.ep=4 must divide dp\*cp\*tp = 1\*1\*2 = 2"):
        arrange(2, tp=2, ep=4)


def test_a_topology_is_a_value() -> None:
    with pytest.raises(AttributeError):
        Topology().dp = 2  # type: ignore[misc]
    assert hash(Topology(dp=2)) == hash(Topology(dp=2)) and Topology(dp=2) != Topology(tp=2)
