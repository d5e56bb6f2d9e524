"""Locality against a slow loop over drawn layouts, and what placements do to node-limited routing."""

import numpy as np
import pytest
import torch
from torch import Tensor

from model.config import MoEConfig
from model.router import choose
from parallel.balance import permutation
from parallel.locality import count, look, total
from parallel.topology import Axis, Topology


def loop(experts: Tensor, order: Tensor, group: tuple[int, ...], rank: int, ranks_per_node: int) -> tuple:
    """One choice at a time: how many nodes each token touches, rows here, inside and across, nodes entered."""
    slots = len(order) // len(group)
    touched, rows, entries = [], [0, 0, 0], 0
    for token in experts.tolist():
        seen = set()
        for expert in token:
            host = group[order.tolist().index(expert) // slots]
            seen.add(host // ranks_per_node)
            if host == rank:
                rows[0] += 1
            elif host // ranks_per_node == rank // ranks_per_node:
                rows[1] += 1
            else:
                rows[2] += 1
        touched.append(len(seen))
        entries += len(seen - {rank // ranks_per_node})
    return touched, rows, entries


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
        group = topology.group(rank, Axis.ep)
        number = ep * int(random.integers(1, 4))
        order = torch.randperm(number, generator=generator)
        experts = route(int(random.integers(0, 9)), number, int(random.integers(1, number + 1)), generator)
        ranks_per_node = int(random.integers(1, 7))
        found = count(experts, look(order, group, rank, ranks_per_node))
        touched, rows, entries = loop(experts, order, group, rank, ranks_per_node)
        assert found.rows.tolist() == rows
        assert found.entries.item() == entries
        assert found.touched.tolist() == np.bincount(touched, minlength=len(found.touched)).tolist()
        assert found.mean_nodes() == pytest.approx(np.mean(touched) if touched else 0)
        assert found.max_nodes() == max(touched, default=0)
        assert found.travelled(14336) == (rows[1] * 14336, rows[2] * 14336)
        across += rows[2]
    assert across > 500


def test_the_example_of_the_file() -> None:
    view = look(torch.arange(16), range(8), rank=5, ranks_per_node=4)
    found = count(torch.tensor([[10, 12, 13, 2]]), view)
    assert found.touched.tolist() == [0, 0, 1, 0, 0]
    assert found.rows.tolist() == [1, 2, 1]
    assert found.entries.item() == 1


def test_an_order_says_where_experts_are() -> None:
    """Slots 0, 1 are rank 4's and 2, 3 rank 5's: each a node of its own."""
    view = look(torch.tensor([3, 1, 0, 2]), (4, 5), rank=5, ranks_per_node=1)
    assert (view.own, view.nodes) == (1, 2)
    assert view.node.tolist() == [1, 0, 1, 0]
    assert view.reach.tolist() == [0, 2, 0, 2]


def test_every_choice_is_a_row_and_entries_are_no_more_than_rows_across() -> None:
    generator = torch.Generator().manual_seed(1)
    parts = [
        count(route(50, 32, 6, generator), look(torch.arange(32), range(16), rank, ranks_per_node=4))
        for rank in range(16)
    ]
    both = total(parts)
    assert both.touched.sum() == 16 * 50 and both.rows.sum() == 16 * 50 * 6
    assert both.touched.tolist() == sum(part.touched for part in parts).tolist()
    assert 0 < both.entries.item() < both.rows[2].item()


def test_without_tokens_nothing_is_counted() -> None:
    found = count(torch.zeros(0, 4, dtype=torch.int64), look(torch.arange(8), range(4), 0, 2))
    assert found.touched.tolist() == [0] * 5 and found.rows.tolist() == [0, 0, 0] and found.entries.item() == 0
    assert found.mean_nodes() == 0.0 and found.max_nodes() == 0


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
        name: count(experts, look(torch.from_numpy(order), range(32), 0, 4)).max_nodes()
        for name, order in orders.items()
    }
    assert most["identity"] == most["kept"] == 2
    assert most["free"] > 2
    assert (orders["kept"] != orders["identity"]).any()


def test_a_rank_outside_the_group_and_an_uneven_group_are_errors() -> None:
    with pytest.raises(ValueError, match=r"rank=4 must be one of the ep group \(0, 1, 2, 3\)"):
        look(torch.arange(8), range(4), 4, 2)
    with pytest.raises(ValueError, match="an ep group of 3 must divide the number of experts, 8"):
        look(torch.arange(8), range(3), 0, 2)
