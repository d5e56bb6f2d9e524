"""Locality against a slow loop over drawn layouts, and what placements do to node-limited routing."""

import numpy as np
import pytest
import torch
from torch import Tensor

from model.config import MoEConfig
from model.router import choose
from parallel.balance import permutation
from parallel.exchange import address
from parallel.locality import Travel, count, look
from parallel.topology import Axis, Topology


def loop(experts: Tensor, order: Tensor, group: tuple[int, ...], rank: int, ranks_per_node: int) -> list[int]:
    """One choice at a time: tokens, nodes touched, rows inside and across; a row for each rank that a token visits."""
    slots = len(order) // len(group)
    nodes, inside, across = 0, 0, 0
    for token in experts.tolist():
        hosts = {group[order.tolist().index(expert) // slots] for expert in token}
        nodes += len({host // ranks_per_node for host in hosts})
        same = {host for host in hosts if host // ranks_per_node == rank // ranks_per_node}
        inside, across = inside + len(same - {rank}), across + len(hosts - same)
    return [len(experts), nodes, inside, across]


def travel(experts: Tensor, order: Tensor, group: tuple[int, ...], rank: int, ranks_per_node: int) -> Travel:
    """What the exchange counts, with rows of one byte."""
    sending = address(order.argsort()[experts], len(order), len(group))
    return Travel(*count(sending.touched, look(group, rank, ranks_per_node), 1).tolist())


def route(tokens: int, experts: int, k: int, generator: torch.Generator) -> Tensor:
    """Distinct experts [T, K] for every token."""
    return torch.rand(tokens, experts, generator=generator).topk(k, dim=-1).indices


def test_counts_are_those_of_a_slow_loop() -> None:
    random, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    across = 0
    for _ in range(200):
        pp, dp, tp = (int(random.integers(1, 5)) for _ in range(3))
        ep = int(random.choice([degree for degree in range(1, dp * tp + 1) if dp * tp % degree == 0]))
        topology = Topology(pp=pp, dp=dp, tp=tp, ep=ep)
        rank = int(random.integers(topology.world))
        number = ep * int(random.integers(1, 4))
        order = torch.randperm(number, generator=generator)
        experts = route(int(random.integers(0, 9)), number, int(random.integers(1, number + 1)), generator)
        where = (experts, order, topology.group(rank, Axis.ep), rank, int(random.integers(1, 7)))
        found = travel(*where)
        assert list(found) == loop(*where)
        assert found.mean_nodes() == pytest.approx(found.nodes / len(experts) if len(experts) else 0)
        across += found.across
    assert across > 300


def test_the_example_of_the_file() -> None:
    found = travel(torch.tensor([[10, 12, 13, 2]]), torch.arange(16), tuple(range(8)), rank=5, ranks_per_node=4)
    assert found == Travel(tokens=1, nodes=2, inside=1, across=1)


def test_bytes_are_rows_times_their_size() -> None:
    touched = torch.tensor([[1, 0], [1, 1], [0, 1]])
    assert count(touched, look((0, 1, 2), 1, 2), 14336).tolist() == [2, 3, 14336, 14336]


def test_limited_routing_touches_few_nodes_as_long_as_groups_stay_within_a_node() -> None:
    """8 groups of experts on 8 nodes, at most 2 groups a token: a free permutation undoes the limit, one that keeps
    groups does not."""
    generator = torch.Generator().manual_seed(2)
    moe = MoEConfig(experts=64, top_k=6, ffn=1, groups=8, top_groups=2)
    skew = torch.randn(64, generator=generator)
    experts = choose(torch.sigmoid(torch.randn(500, 64, generator=generator) + skew), moe)
    load = torch.bincount(experts.flatten(), minlength=64).numpy()
    orders = {
        "identity": np.arange(64),
        "kept": permutation(load, 32, groups=8, nodes=8),
        "free": permutation(load, 32),
    }
    most = {
        name: max(travel(token[None], torch.from_numpy(order), tuple(range(32)), 0, 4).nodes for token in experts)
        for name, order in orders.items()
    }
    assert most["identity"] == most["kept"] == 2
    assert most["free"] > 2
    assert (orders["kept"] != orders["identity"]).any()
