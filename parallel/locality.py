"""How far tokens travel to their experts: nodes touched by a token, bytes inside a node, bytes to other nodes.

    rank 5 sends, 4 ranks a node, ep group 0..7        token's experts on ranks 5, 6, 6, 1
    nodes touched   2                                  0 and 1: what node-limited routing bounds
    rows            1 here, 1 inside, 1 across         one for each rank, as parallel/exchange.py sends them

Routing over groups bounds the nodes by ``model.moe.top_groups`` as long as every group of experts lies within one node:
an order that spreads a group over nodes (``permutation`` without groups) undoes that, and this is where it is seen.

Counts add up, over layers, micro-batches and ranks; only whoever reads them waits for the device.
Shapes: T tokens of one rank, n ranks in its ep group, N nodes that the group touches.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class View(NamedTuple):
    """The ep group, seen from one rank."""

    node: Tensor  # [n] int64, the node of each member, numbered 0 .. N-1
    nodes: int  # N
    place: int  # of the rank that looks


class Travel(NamedTuple):
    """What dispatches moved, one way; combines bring as much back."""

    tokens: int
    nodes: int  # touched, summed over tokens
    inside: int  # bytes to other ranks of the sender's node
    across: int  # bytes to other nodes

    def mean_nodes(self) -> float:
        """Nodes that a token touches; 0 where experts are not spread."""
        return self.nodes / max(self.tokens, 1)


def look(group: Sequence[int], rank: int, ranks_per_node: int, device: torch.device | None = None) -> View:
    """What ``rank`` sees of its ep ``group`` (global ranks); node i has ranks ``ranks_per_node * i`` and on."""
    number = {node: i for i, node in enumerate(sorted({member // ranks_per_node for member in group}))}
    nodes = [number[member // ranks_per_node] for member in group]
    return View(torch.tensor(nodes, device=device), len(number), group.index(rank))


def count(touched: Tensor, view: View, row_bytes: int) -> Tensor:
    """``touched`` [n, T], 1 where a token has experts on a member of the group -> the four numbers of ``Travel``."""
    held = touched.shape[1]
    entered = touched.new_zeros(view.nodes, held).index_add_(0, view.node, touched) > 0  # [N, T]
    rows = touched.sum(1)
    beside = view.node == view.node[view.place]
    here, inside = rows[view.place], (rows * beside).sum()
    tokens = touched.new_full((), held)
    return torch.stack((tokens, entered.sum(), (inside - here) * row_bytes, (rows.sum() - inside) * row_bytes))
