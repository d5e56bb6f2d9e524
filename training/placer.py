"""Experts change ranks as their measured loads ask for: every ``parallel.rebalance_every`` steps, between two steps.

    load of the steps since --> parallel/balance.py: the few exchanges that even ranks out --> training/move.py

A router that limits a token to a few groups of experts does so to limit the nodes it visits: then no expert leaves the
node that it started on. Numbers do not change, only where they are computed.
"""

import torch
from torch import Tensor

from parallel.balance import rearrange
from parallel.build import Shards, Stages
from parallel.exchange import find_exchanges
from parallel.mesh import Mesh
from parallel.topology import Axis
from training.agree import sum_over
from training.average import Average
from training.engine import Engine
from training.move import move_experts


class Placer:
    """Loads since the last move, and the next one."""

    def __init__(
        self, stages: Stages, shards: Shards, engine: Engine, average: Average, mesh: Mesh, every: int
    ) -> None:
        """Moves every ``every`` steps, 0: never. All ranks move alike, for all have seen the same loads."""
        self._stages, self._shards, self._engine, self._mesh = stages, shards, engine, mesh
        self._average = average
        self._every = every if mesh.degree(Axis.ep) > 1 else 0
        self.steps = 0  # taken
        self.load: Tensor | None = None  # [L, E], of the steps since the last move

    def take(self, load: Tensor) -> int:
        """``load`` [L, E] of a step that is done, over the whole global batch -> how many experts changed ranks.

        Collective over all ranks.
        """
        if not self._every:
            return 0
        self.load = load.clone() if self.load is None else self.load + load
        self.steps += 1
        if self.steps % self._every:
            return 0
        orders, moved = self._plan(self.load)
        self.load = None
        everywhere = int(sum_over(torch.tensor(moved, device=self._mesh.device), self._mesh))
        if everywhere:
            average = self._average.chunks()
            move_experts(self._stages, self._shards, self._engine, orders, self._mesh, average)
        return everywhere // self._mesh.topology.stage_size  # every rank of a stage has counted the same

    def _plan(self, load: Tensor) -> tuple[dict[str, Tensor], int]:
        """Orders of the blocks whose experts move, and how many change ranks."""
        models = self._stages.values()
        moe, ranks = next(iter(models)).config.moe, self._mesh.degree(Axis.ep)
        nodes = max(1, ranks // self._mesh.ranks_per_node) if moe.groups > moe.top_groups else 1
        orders, moved = {}, 0
        rows = [row for model in models for row in model.rows()]
        for (name, exchange), counts in zip(find_exchanges(models).items(), load[rows], strict=True):
            now = exchange.places.argsort()  # the expert in each slot
            then = torch.from_numpy(rearrange(counts.cpu().numpy(), now.cpu().numpy(), ranks, nodes)).to(now.device)
            ranks_now, ranks_then = (order.argsort() // (len(order) // ranks) for order in (now, then))
            changed = int((ranks_now != ranks_then).sum())
            if changed:
                orders[name], moved = then, moved + changed
        return orders, moved
