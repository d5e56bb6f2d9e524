"""Which part of a parameter a rank holds: plans, spans, rectangles and their holders, on drawn topologies."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from test_topology import TOPOLOGIES

from parallel.placement import REPLICATED, Placement, Row, cut, holders, place, span
from parallel.topology import Axis, Topology

PLAN = (
    Row("*.o.weight", Placement(Axis.tp, 1)),
    Row("*.routed.*", Placement(Axis.ep, 0)),
    Row("*", REPLICATED),
)
PLACEMENTS = [REPLICATED, *(Placement(axis, dim) for axis in (Axis.tp, Axis.ep) for dim in (0, 1))]


def cases() -> Iterator[tuple[Topology, Placement, tuple[int, int]]]:
    """Every topology with every placement, of a shape that is seldom a multiple and may be smaller than the degree."""
    random = np.random.default_rng(1)
    for topology in TOPOLOGIES[:150]:
        for placement in PLACEMENTS:
            yield topology, placement, tuple(random.integers(1, 40, size=2).tolist())


def test_the_first_row_that_matches_places() -> None:
    names = ["blocks.0.mla.o.weight", "blocks.1.routed.up.weight", "norm.weight"]
    assert place(PLAN, names) == dict(zip(names, (row.placement for row in PLAN), strict=True))


def test_a_parameter_without_a_row_is_named() -> None:
    with pytest.raises(ValueError, match=r"^no row of the plan matches the parameter head\.weight$"):
        place(PLAN[:2], ["a.o.weight", "a.routed.up", "head.weight"])


def test_a_row_without_a_parameter_is_named() -> None:
    with pytest.raises(ValueError, match=r"^rows of the plan match no parameter: \*\.routed\.\*, \*\.v\.weight$"):
        place((Row("*.v.weight", REPLICATED), *PLAN), ["a.o.weight", "norm.weight"])


def test_a_row_behind_a_wider_one_is_named() -> None:
    """It would never be used, and whoever wrote it believes that it is."""
    with pytest.raises(ValueError, match=r"^rows of the plan match no parameter: \*\.o\.weight$"):
        place((PLAN[2], PLAN[0]), ["a.o.weight"])


def test_patterns_tell_capitals_apart() -> None:
    with pytest.raises(ValueError, match=r"matches the parameter A\.O\.weight$"):
        place(PLAN[:1], ["A.O.weight"])


def test_spans_tile_and_are_even() -> None:
    for size in (0, 1, 5, 7, 8, 129280):
        for degree in (1, 2, 3, 7, 8, 64):
            parts = [span(size, degree, index) for index in range(degree)]
            assert parts[0].start == 0 and parts[-1].stop == size
            assert all(left.stop == right.start for left, right in pairwise(parts))
            lengths = {len(part) for part in parts}
            assert max(lengths) - min(lengths) <= (size % degree > 0)


def test_cuts_tile_the_parameter_holders_many_times() -> None:
    for topology, placement, shape in cases():
        times = np.zeros(shape, dtype=int)
        for rank in topology.group(0, Axis.stage):
            times[cut(shape, placement, topology, rank).slices] += 1
        assert (times == len(holders(placement, topology, 0))).all(), (topology, placement, shape)


def test_holders_hold_the_same_and_nobody_else_does() -> None:
    for topology, placement, shape in cases():
        rank = topology.world - 1
        mine = cut(shape, placement, topology, rank)
        same = holders(placement, topology, rank)
        covered = np.zeros(shape, dtype=int)
        covered[mine.slices] = 1
        for other in topology.group(rank, Axis.stage):
            theirs = cut(shape, placement, topology, other)
            if other in same:
                assert theirs == mine, (topology, placement, shape)
            else:
                assert not covered[theirs.slices].any(), (topology, placement, shape)


def test_a_shard_describes_itself() -> None:
    for topology, placement, shape in cases():
        shard = cut(shape, placement, topology, topology.world // 2)
        whole = np.arange(shape[0] * shape[1]).reshape(shape)
        assert whole[shard.slices].shape == shard.shape
        assert shard.global_shape == shape and shard.placement == placement
        uncut = [dim for dim in range(2) if placement.axis is None or dim != placement.dim]
        assert all((shard.offset[dim], shard.shape[dim]) == (0, shape[dim]) for dim in uncut)


def test_holders_by_hand() -> None:
    """dp=4 tp=2 ep=4: rank 5 is dp 2, tp 1; edp 1, ep 1."""
    topology = Topology(pp=2, dp=4, tp=2, ep=4)
    assert holders(REPLICATED, topology, 5) == tuple(range(8))
    assert holders(Placement(Axis.tp, 0), topology, 5) == (1, 3, 5, 7)
    assert holders(Placement(Axis.ep, 0), topology, 5) == (1, 5)
    assert holders(Placement(Axis.ep, 0), topology, 13) == (9, 13), "the other stage"
    shard = cut((2, 6, 4), Placement(Axis.tp, 1), topology, 5)
    assert (shard.offset, shard.shape) == ((0, 3, 0), (2, 3, 4))
