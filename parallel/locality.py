"""How far tokens travel to their experts: nodes touched by a token, rows and bytes inside a node and across nodes.

    rank 5 sends, 4 ranks a node, ep group 0..7        token's experts on ranks 5, 6, 6, 1
    nodes touched   2                                  0 and 1: what node-limited routing bounds
    rows            1 here, 2 inside, 1 across         a row for every choice, as parallel/exchange.py sends them
    entries         1                                  rows across if a token entered another node once and was
                                                       handed on inside it, the least that any exchange can do

Routing over groups bounds the nodes by ``model.moe.top_groups`` as long as every group of experts lies within one node:
an order that spreads a group over nodes (``permutation`` without groups) undoes that, and this is where it is seen.

A step record would hold it so: each routed layer and micro-batch gives a ``Locality`` of its ``Routing.experts``, once
(a recomputed forward counts nothing); ``total`` adds those of a rank; every field is summed over Axis.stage beside the
load, for counts add up and means do not; then, once a step, ``mean_nodes``, ``max_nodes`` and ``travelled`` of
hidden * itemsize bytes are read. Only these three wait for a device.
Shapes: T tokens of one rank, K choices, E experts in all, N nodes that the ep group touches.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

HERE, INSIDE, ACROSS = range(3)  # on the sender's own rank, on another of its node, on another node


class View(NamedTuple):
    """Where experts are, seen from one rank."""

    node: Tensor  # [E] int64, the node of each expert, numbered 0 .. N-1 within the ep group
    reach: Tensor  # [E] int64, HERE, INSIDE or ACROSS
    own: int  # the node of the rank that looks
    nodes: int  # N


class Travelled(NamedTuple):
    """Bytes that one way takes: the dispatch; as many come back in the combine."""

    inside: int
    across: int


class Locality(NamedTuple):
    """Counts of one dispatch, or of many added up."""

    touched: Tensor  # [K + 1] int64, tokens whose experts lie on 0, 1, .. K nodes, the sender's included
    rows: Tensor  # [3] int64, rows that stay HERE, stay INSIDE the node, go ACROSS
    entries: Tensor  # [] int64, pairs of a token and another node than its own

    def mean_nodes(self) -> float:
        """Nodes that a token touches; 0 without tokens."""
        weighed = (self.touched * torch.arange(len(self.touched), device=self.touched.device)).sum()
        return float(weighed) / max(int(self.touched.sum()), 1)

    def max_nodes(self) -> int:
        """The most nodes that any token touches; 0 without tokens."""
        return max((nodes for nodes, tokens in enumerate(self.touched.tolist()) if tokens), default=0)

    def travelled(self, row_bytes: int) -> Travelled:
        """Bytes on the way, for rows of ``row_bytes`` (hidden size times bytes an element, scales included)."""
        _, inside, across = self.rows.tolist()
        return Travelled(inside * row_bytes, across * row_bytes)


def look(order: Tensor, group: Sequence[int], rank: int, ranks_per_node: int) -> View:
    """Where ``rank`` of the ep ``group`` (global ranks) finds the experts when slot i holds expert ``order`` [E][i].

    Each member holds E / len(group) slots in turn; ranks ``ranks_per_node * n`` and on are those of node n. Raises
    ValueError where ``rank`` is none of the group, or the group does not divide the experts.
    """
    if rank not in group:
        raise ValueError(f"rank={rank} must be one of the ep group {tuple(group)}")
    if len(order) % len(group):
        raise ValueError(f"an ep group of {len(group)} must divide the number of experts, {len(order)}")
    number = {node: i for i, node in enumerate(sorted({member // ranks_per_node for member in group}))}
    own = number[rank // ranks_per_node]
    nodes = [number[member // ranks_per_node] for member in group]
    reach = [HERE if m == rank else INSIDE if n == own else ACROSS for m, n in zip(group, nodes, strict=True)]
    member = torch.empty_like(order)
    member[order] = torch.arange(len(order), device=order.device) // (len(order) // len(group))  # [E], who holds e
    return View(order.new_tensor(nodes)[member], order.new_tensor(reach)[member], own, len(number))


def count(experts: Tensor, view: View) -> Locality:
    """Routed ``experts`` [T, K] of the looking rank's tokens -> what their dispatch moves."""
    nodes = view.node[experts]  # [T, K]
    touched = torch.zeros(len(experts), view.nodes, dtype=torch.int64, device=experts.device).scatter_(1, nodes, 1)
    return Locality(
        touched=_tally(touched.sum(1), experts.shape[1] + 1),
        rows=_tally(view.reach[experts].flatten(), ACROSS + 1),
        entries=touched.sum() - touched[:, view.own].sum(),
    )


def total(parts: Sequence[Locality]) -> Locality:
    """The sum of counts of layers, micro-batches or ranks of one model. At least one."""
    return Locality(*(torch.stack(counts).sum(0) for counts in zip(*parts, strict=True)))


def _tally(numbers: Tensor, size: int) -> Tensor:
    """``numbers`` [..], each below ``size`` -> how often each occurs, [size]. Unlike bincount, known in advance."""
    return numbers.new_zeros(size).scatter_add_(0, numbers, torch.ones_like(numbers))
