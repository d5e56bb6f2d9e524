"""The balancer: properties over drawn loads, examples worked by hand, and every packing of small cases."""

import doctest
import math
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from parallel.balance import Floats, carried, pack, permutation, rearrange, replicas, replicate


class Case(NamedTuple):
    load: Floats  # [E]
    slots: int
    ranks: int
    groups: int
    nodes: int


def draw(count: int) -> Iterator[Case]:
    """Loads from even to extreme, with ties and with empty experts, on shapes that divide."""
    random = np.random.default_rng(0)
    for _ in range(count):
        nodes, per_node, size = (int(random.integers(1, high)) for high in (5, 5, 6))
        ranks = nodes * per_node
        groups = int(random.integers(1, 4)) * int(random.choice([1, nodes]))
        experts = math.lcm(groups, ranks) * size
        load = np.floor(random.exponential(50, experts) ** random.uniform(0.2, 3))
        load[random.random(experts) < random.choice([0, 0.3, 1], p=[0.6, 0.3, 0.1])] = 0
        slots = experts + ranks * int(random.integers(0, 2 * size + 1))
        yield Case(load, slots, ranks, groups, nodes)


CASES = list(draw(500))


def test_cases_cover_what_they_should() -> None:
    hierarchical = [case for case in CASES if case.nodes > 1 and case.groups % case.nodes == 0]
    assert len(hierarchical) > 200
    assert sum(case.nodes > 1 and case.groups % case.nodes > 0 for case in CASES) > 50
    assert sum(case.slots > len(case.load) for case in CASES) > 300
    assert sum(not case.load.any() for case in CASES) > 20


def test_a_permutation_holds_every_expert_once_and_is_never_worse_than_none() -> None:
    better = 0
    for case in CASES:
        identity = np.arange(len(case.load))
        for groups, nodes in ((1, 1), (case.groups, case.nodes)):
            order = permutation(case.load, case.ranks, groups, nodes)
            assert sorted(order) == identity.tolist()
            assert (np.diff(order.reshape(case.ranks, -1)) > 0).all(), "ascending within a rank"
            before, after = (carried(case.load, x, case.ranks) for x in (identity, order))
            assert after.max() <= before.max()
            better += after.max() < before.max()
            assert (after.max() < before.max()) or (order == identity).all()
    assert better > 500


def test_a_permutation_that_keeps_groups_keeps_them_within_a_node() -> None:
    for case in CASES:
        if case.groups % case.nodes == 0:
            order = permutation(case.load, case.ranks, case.groups, case.nodes)
            assert_groups_within_nodes(order, case)


def assert_groups_within_nodes(experts: np.ndarray, case: Case) -> None:
    """Each node's slots hold experts of groups / nodes groups, and all experts of those."""
    size = len(case.load) // case.groups
    for held in experts.reshape(case.nodes, -1):
        assert len(np.unique(held // size)) == case.groups // case.nodes
        assert len(np.unique(held)) == len(case.load) // case.nodes


def test_replicas_fill_the_slots_and_leave_no_expert_out() -> None:
    for case in CASES:
        maps = replicas(*case)
        assert len(maps.experts) == case.slots and maps.copies.sum() == case.slots
        assert maps.copies.min() >= 1 and len(maps.copies) == len(case.load)
        assert np.bincount(maps.experts, minlength=len(case.load)).tolist() == maps.copies.tolist()
        assert maps.experts.reshape(case.ranks, -1).shape == (case.ranks, case.slots // case.ranks)


def test_both_maps_of_replicas_say_the_same() -> None:
    for case in CASES:
        maps = replicas(*case)
        assert maps.slots.shape == (len(case.load), maps.copies.max())
        for expert, (places, count) in enumerate(zip(maps.slots, maps.copies, strict=True)):
            assert places[:count].tolist() == np.flatnonzero(maps.experts == expert).tolist()
            assert (places[count:] == -1).all()


def test_hierarchical_replicas_keep_groups_within_nodes_and_global_ones_ignore_them() -> None:
    for case in CASES:
        if case.groups % case.nodes == 0:
            assert_groups_within_nodes(replicas(*case).experts, case)
        else:
            free = replicas(case.load, case.slots, case.ranks)
            assert (replicas(*case).experts == free.experts).all()


def test_another_replica_goes_where_a_replica_carries_most() -> None:
    """No expert has one replica too many: without its last, each replica would carry at least as much as any now."""
    for case in CASES:
        count = replicas(case.load, case.slots, case.ranks).copies
        once_less = case.load[count > 1] / (count[count > 1] - 1)
        assert (once_less >= (case.load / count).max()).all()


def test_carried_adds_up() -> None:
    for case in CASES:
        total = carried(case.load, replicas(*case).experts, case.ranks)
        assert total.shape == (case.ranks,)
        assert total.sum() == pytest.approx(case.load.sum(), rel=1e-12)
    assert carried([6, 1, 1], np.array([0, 1, 0, 2]), 2).tolist() == [4, 4]


def test_a_permutation_worked_by_hand() -> None:
    """40 to rank 0, 10, 8, 6 and 5 to rank 1, which is full; 4, 4 and 3 are left for rank 0."""
    load = [40, 10, 8, 6, 5, 4, 4, 3]
    assert permutation(load, 2).tolist() == [0, 5, 6, 7, 1, 2, 3, 4]
    assert carried(load, permutation(load, 2), 2).tolist() == [51, 29]


def test_groups_worked_by_hand() -> None:
    """Groups of two weigh 17, 9, 3, 1, so nodes take 0, 3 and 1, 2; 9, 8, 1, 0 and 6, 3, 2, 1 are then paired."""
    load = [9, 8, 6, 3, 2, 1, 1, 0]
    order = permutation(load, 4, groups=4, nodes=2)
    assert order.tolist() == [0, 7, 1, 6, 2, 5, 3, 4]
    assert carried(load, order, 4).tolist() == [9, 9, 7, 5]


def test_replicas_worked_by_hand() -> None:
    """Two slots more than experts: 12 becomes 6 + 6, then 7 is the most and becomes 3.5 + 3.5; six replicas weigh
    6, 6, 5, 4, 3.5, 3.5 and go to ranks 0, 1, 2, 2, 0, 1 in this order."""
    maps = replicas([7, 12, 5, 4], slots=6, ranks=3)
    assert maps.experts.tolist() == [1, 0, 1, 0, 2, 3]
    assert maps.slots.tolist() == [[1, 3], [0, 2], [4, -1], [5, -1]]
    assert maps.copies.tolist() == [2, 2, 1, 1]
    assert carried([7, 12, 5, 4], maps.experts, 3).tolist() == [9.5, 9.5, 9]


@pytest.mark.parametrize(
    ("load", "published"),
    [
        ([90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1]),
        ([20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]),
    ],
)
def test_replicas_are_those_of_the_published_example(load: list[int], published: list[int]) -> None:
    """The two layers of the example in EPLB's own README: 16 replicas, 4 groups, 2 nodes, 8 devices."""
    assert replicas(load, 16, 8, groups=4, nodes=2).experts.tolist() == published


def best(load: tuple[int, ...], ranks: int) -> int:
    """The least load of the fullest rank over all packings into equal counts: one rank at a time, heaviest first."""
    if ranks == 1:
        return sum(load)
    first, *rest = range(len(load))
    least = sum(load)
    for others in combinations(rest, len(load) // ranks - 1):
        held = {first, *others}
        weight = sum(load[i] for i in held)
        if weight < least:
            left = tuple(load[i] for i in range(len(load)) if i not in held)
            least = min(least, max(weight, best(left, ranks - 1)))
    return least


def test_packing_stays_within_the_bound_of_the_best() -> None:
    random = np.random.default_rng(1)
    worst = 1.0
    shapes = [(2, 4), (2, 6), (2, 10), (3, 6), (3, 9), (4, 8)]
    for _ in range(400):
        ranks, experts = shapes[random.integers(len(shapes))]
        load = tuple(sorted(random.integers(0, random.choice([4, 10, 100]), experts).tolist(), reverse=True))
        order = pack(np.array(load, dtype=np.float64), ranks)
        found, least = carried(load, order.ravel(), ranks).max(), best(load, ranks)
        assert least <= found <= least * (4 / 3 - 1 / (3 * ranks)) + 1e-9, (load, ranks)
        worst = max(worst, found / max(least, 1))
    assert worst > 1.05, "the cases are too easy to measure a gap"


@pytest.mark.parametrize(
    ("load", "ranks", "gap"), [((3, 3, 2, 2, 2, 0), 2, 7 / 6), ((5, 5, 4, 4, 3, 3, 3, 0, 0), 3, 11 / 9)]
)
def test_the_bound_is_reached(load: tuple[int, ...], ranks: int, gap: float) -> None:
    order = pack(np.array(load, dtype=np.float64), ranks).ravel()
    assert carried(load, order, ranks).max() / best(load, ranks) == pytest.approx(gap)


def test_packing_two_to_a_rank_is_the_best() -> None:
    random = np.random.default_rng(2)
    for _ in range(100):
        load = tuple(sorted(random.integers(0, 20, 8).tolist(), reverse=True))
        assert carried(load, pack(np.array(load, dtype=np.float64), 4).ravel(), 4).max() == best(load, 4)


def test_ties_go_to_the_lower_number() -> None:
    ones = np.ones(8)
    assert pack(ones, 2).tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert permutation(ones, 2).tolist() == list(range(8))
    assert permutation([2, 2, 1, 1], 2).tolist() == [0, 2, 1, 3]
    assert replicate(np.zeros(3), 7).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert pack(np.array([1.0, 5.0, 3.0]), 3).tolist() == [[0], [1], [2]], "one to a rank: nothing to gain by moving"


def test_counts_beyond_float32_are_exact() -> None:
    """One token in 2^40 decides which expert is the heavier one."""
    assert pack(np.array([2.0**40, 2.0**40 + 1, 1, 0]), 2).tolist() == [[1, 3], [0, 2]]
    assert replicas([2**40, 2**40 + 1], slots=3, ranks=1).copies.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (([1, 2, 3], 2), "ranks=2 must divide the number of slots, 3"),
        (([1, 2, 3, 4], 0), "ranks=0, groups=1 and nodes=1 must be at least 1"),
        (([1, 2, 3, 4], 2, 3, 1), "groups=3 must divide the number of experts, 4"),
        (([1, 2, 3, 4], 2, 4, 4), "nodes=4 must divide the number of ranks, 2"),
        (([1, -2], 1), "finite number of at least 0"),
        (([1, math.nan], 1), "finite number of at least 0"),
        (([[1, 2]], 1), r"shape \(1, 2\)"),
        (([], 1), r"shape \(0,\)"),
    ],
)
def test_what_does_not_fit_is_an_error(arguments: tuple, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        permutation(*arguments)


def test_too_few_slots_are_an_error() -> None:
    with pytest.raises(ValueError, match="slots=2 must be at least the number of experts, 4"):
        replicas([1, 2, 3, 4], 2, 2)


def test_the_examples_of_the_page_print_what_it_shows() -> None:
    result = doctest.testfile(str(Path(__file__).parents[2] / "docs" / "balance.md"), module_relative=False)
    assert result.failed == 0 and result.attempted >= 8


def test_rearranging_moves_few_experts_within_their_node_and_never_makes_it_worse() -> None:
    generator = np.random.default_rng(4)
    for _ in range(200):
        ranks, each, nodes = 2 ** generator.integers(1, 4), generator.integers(1, 6), 2 ** generator.integers(0, 2)
        load = generator.exponential(size=ranks * each) ** 2
        order = np.arange(len(load))
        better = rearrange(load, order, ranks, nodes)
        assert sorted(better) == list(order)
        assert carried(load, better, ranks).max() <= carried(load, order, ranks).max()
        size = len(load) // nodes
        assert all(set(better[n * size :][:size]) == set(order[n * size :][:size]) for n in range(nodes))
        assert (rearrange(load, better, ranks, nodes) == better).all()


def test_rearranging_a_worked_example() -> None:
    # 7 + 5 against 2 + 2: the 7 and a 2 change places, 7 against 9, and no exchange helps after that.
    assert rearrange([7, 5, 2, 2], [0, 1, 2, 3], 2).tolist() == [2, 1, 0, 3]
