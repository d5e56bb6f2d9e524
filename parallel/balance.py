"""Which rank holds which expert, so that every rank has the same work: placements from measured loads.

An order says which expert lies in each slot; rank r of R owns the slots r P/R .. (r+1) P/R - 1.

    load      40 10  8  6 | 5  4  4  3        8 experts, 2 ranks, 4 slots each: 64 and 16 tokens
    order      0  5  6  7 | 1  2  3  4        permutation(load, 2): 51 and 29, no order does better

Three steps make every order (the published balancer of DeepSeek-V3, EPLB; the report's section 3.4):

    groups of experts -> nodes      pack: heaviest first, each to the lightest bin that has room; bins hold equal counts
    experts -> replicas             replicate: while slots are left, one more of the expert whose replicas carry most
    replicas -> ranks of a node     pack

Training has as many slots as experts, so nothing is replicated: the order is a permutation. Serving has more; a token
goes to any one replica, so each carries load / copies. With one group and one node the order is free of nodes. Routers
that limit a token to a few groups limit it to as few nodes only while every group lies within one node.

Packing heaviest first stays within 4/3 - 1/(3 bins) of the best possible (Graham 1969, bins of any count; for equal
counts the tests measure it against every packing of small cases).
Shapes: E experts, P >= E slots, G groups of E/G consecutive experts. Numpy only: no tensor, no rank, no clock.
"""

from heapq import heapify, heappop, heappush
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Replicas(NamedTuple):
    """Where the replicas of every expert lie."""

    experts: Ints  # [P] the expert in each slot
    slots: Ints  # [E, max(copies)] the slots of each expert, ascending, then -1
    copies: Ints  # [E] how many replicas, at least 1


def permutation(load: ArrayLike, ranks: int, groups: int = 1, nodes: int = 1) -> Ints:
    """Measured ``load`` [E] -> order [E]: a permutation, E/ranks experts to a rank, ascending within it.

    Where packing does not lower the load of the fullest rank below that of 0, 1, .. E-1, that is what it returns.
    Where ``nodes`` divides ``groups``, each group stays within one node of ranks/nodes ranks. Ties go to the lower
    number: equal loads give equal orders on every machine. Raises ValueError where counts do not divide.
    """
    load = _check(load, len(np.atleast_1d(load)), ranks, groups, nodes)
    order = np.sort(_spread(load, len(load), ranks, groups, nodes).reshape(ranks, -1)).ravel()
    identity = np.arange(len(load))
    return order if carried(load, order, ranks).max() < carried(load, identity, ranks).max() else identity


def rearrange(load: ArrayLike, order: ArrayLike, ranks: int, nodes: int = 1) -> Ints:
    """Measured ``load`` [E] and the ``order`` [E] in force -> a better one that few experts have to move for.

    As long as it helps, an expert of the fullest rank changes places with one of another rank of the same node, the
    two for which the fuller of both ranks then carries least. No expert ever leaves its node.
    """
    load, order = np.asarray(load, dtype=np.float64), np.array(order, dtype=np.int64).reshape(ranks, -1)
    node = np.arange(ranks) // (ranks // nodes)
    while True:
        total = load[order].sum(1)
        full = int(total.argmax())
        lost = load[order[full]][:, None, None] - load[order]  # [own, ranks, theirs]: what the fullest rank would lose
        after = np.maximum(total[full] - lost, total[:, None] + lost)
        after[:, (node != node[full]) | (np.arange(ranks) == full)] = np.inf
        own, rank, theirs = np.unravel_index(after.argmin(), after.shape)
        if after[own, rank, theirs] >= total[full] * (1 - 1e-9):
            return order.ravel()
        order[full, own], order[rank, theirs] = order[rank, theirs], order[full, own]


def replicas(load: ArrayLike, slots: int, ranks: int, groups: int = 1, nodes: int = 1) -> Replicas:
    """Measured ``load`` [E] -> the maps of ``slots`` replicas on ``ranks``, slots/ranks on each.

    Hierarchical where ``nodes`` divides ``groups``: a group and its replicas lie within one node. Global otherwise.
    Two replicas of one expert may meet on one rank, as in the published balancer. Ties go to the expert with fewer
    replicas, then to the lower number. Raises ValueError where counts do not divide or slots are too few.
    """
    load = _check(load, slots, ranks, groups, nodes)
    experts = _spread(load, slots, ranks, groups, nodes)
    copies = np.bincount(experts, minlength=len(load))
    places = np.full((len(load), copies.max()), -1)
    by_expert = experts.argsort(kind="stable")
    nth = np.arange(slots) - np.repeat(copies.cumsum() - copies, copies)  # a replica's number among those of its expert
    places[experts[by_expert], nth] = by_expert
    return Replicas(experts, places, copies)


def carried(load: ArrayLike, experts: ArrayLike, ranks: int) -> Floats:
    """The load [ranks] of each rank: ``load`` [E] shared evenly by the replicas of an expert, ``experts`` [P]."""
    load, experts = np.asarray(load, dtype=np.float64), np.asarray(experts, dtype=np.int64)
    share = load / np.maximum(np.bincount(experts, minlength=len(load)), 1)
    total: Floats = share[experts].reshape(ranks, -1).sum(1)
    return total


def pack(load: Floats, bins: int) -> Ints:
    """Items of ``load`` [N] -> the items [bins, N/bins] in each bin, in the order in which they came.

    Heaviest first, each into the lightest bin that has room. Where every bin holds one item, item i stays in bin i.
    """
    size = len(load) // bins
    if size == 1:
        return np.arange(bins)[:, None]
    packed: list[list[int]] = [[] for _ in range(bins)]
    room = [(0.0, number) for number in range(bins)]  # a heap: the lightest first, then the lowest number
    for item in (-load).argsort(kind="stable").tolist():
        weight, number = heappop(room)
        packed[number].append(item)
        if len(packed[number]) < size:
            heappush(room, (weight + float(load[item]), number))
    return np.array(packed)


def replicate(load: Floats, slots: int) -> Ints:
    """Experts of ``load`` [E] -> the experts [slots] of all replicas: each once, then whose replicas carry most."""
    experts = list(range(len(load)))
    heap = [(-weight, 1, expert) for expert, weight in enumerate(load.tolist())]
    heapify(heap)
    for _ in range(slots - len(load)):
        _, count, expert = heappop(heap)
        experts.append(expert)
        heappush(heap, (-float(load[expert]) / (count + 1), count + 1, expert))
    return np.array(experts)


def _spread(load: Floats, slots: int, ranks: int, groups: int, nodes: int) -> Ints:
    """``load`` [E] -> the expert [slots] in each slot: groups to nodes, replicas within them, replicas to ranks."""
    if groups % nodes:
        groups = nodes = 1
    members = np.arange(len(load)).reshape(groups, -1)
    parts = []
    for held in pack(load.reshape(groups, -1).sum(1), nodes):
        experts = members[held].ravel()  # [E / nodes]
        copies = experts[replicate(load[experts], slots // nodes)]  # [slots / nodes]
        share = load / np.maximum(np.bincount(copies, minlength=len(load)), 1)
        parts.append(copies[pack(share[copies], ranks // nodes)].ravel())
    return np.concatenate(parts)


def _check(load: ArrayLike, slots: int, ranks: int, groups: int, nodes: int) -> Floats:
    """``load`` as float64, in which counts are exact; ValueError where it is no load or the numbers do not fit."""
    load = np.asarray(load, dtype=np.float64)
    if load.ndim != 1 or not load.size or not (np.isfinite(load) & (load >= 0)).all():
        raise ValueError(f"load must be one finite number of at least 0 for each expert; it has shape {load.shape}")
    if min(slots, ranks, groups, nodes) < 1:
        raise ValueError(f"slots={slots}, ranks={ranks}, groups={groups} and nodes={nodes} must be at least 1")
    rules = {
        f"slots={slots} must be at least the number of experts, {len(load)}": slots >= len(load),
        f"ranks={ranks} must divide the number of slots, {slots}": slots % ranks == 0,
        f"groups={groups} must divide the number of experts, {len(load)}": len(load) % groups == 0,
        f"nodes={nodes} must divide the number of ranks, {ranks}": ranks % nodes == 0,
    }
    for rule, holds in rules.items():
        if not holds:
            raise ValueError(rule)
    return load
