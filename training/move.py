"""Experts change ranks between two steps: their weights and optimizer state travel, and no number changes.

Which rank holds an expert is the exchange's affair alone (``ExpertExchange.places``): routing, gates, biases and loads
speak of experts. What moves is a permutation of slots, for every routed layer, over its ep group:

    a holder's part of master, m, v (and average) --> the whole on every holder --> to the slot's rank --> its part

one tensor at a time, into the state where it lies. Moments move with their weights: the next update is the one that
would have been.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.build import Shards, Stages
from parallel.collectives import all_to_all
from parallel.exchange import find_exchanges
from parallel.mesh import Mesh, Traffic
from parallel.placement import Shard
from parallel.topology import Axis
from training.chunk import Chunk
from training.engine import Engine
from training.gather import name_tensors


@torch.no_grad()
def move_experts(
    stages: Stages,
    shards: Shards,
    engine: Engine,
    orders: Mapping[str, Tensor],
    mesh: Mesh,
    average: Sequence[Chunk] = (),
) -> None:
    """``orders``: for a block's name, the expert [E] of every slot from now on; ``average``: that of the masters, if
    there is one, which lies as they do. Collective."""
    exchanges, held = find_exchanges(stages.values()), name_tensors(stages.values())
    travels: dict[str, Tensor] = {}  # for a parameter, the slot [E] that the content of each slot comes from
    for name, order in orders.items():
        came_from = exchanges[name].places[order]
        exchanges[name].places = order.argsort()
        travels |= {p: came_from for p in shards if p.startswith(f"{name}.experts.routed.")}
    state, parts = engine.state(), ("master", "m", "v", *(("ema",) if average else ()))
    for parameter, came in travels.items():
        wide = torch.promote_types(held[parameter].dtype, torch.float32)
        for name in (f"{part}/{parameter}" for part in parts):
            own = [chunk for chunk in (*state.chunks, *average) if chunk.name == name]
            whole = torch.zeros(shards[parameter].shape, dtype=wide, device=mesh.device)
            _move(own, whole, shards[parameter], came, mesh)
    engine.load(state)  # casts the masters, which have changed in place, and publishes them


def _move(own: list[Chunk], whole: Tensor, shard: Shard, came_from: Tensor, mesh: Mesh) -> None:
    """Puts a rank's part of a tensor together in ``whole``, lets it travel, and gives ``own`` what is theirs of it."""
    starts = [[at - first for at, first in zip(chunk.offset, shard.offset, strict=True)] for chunk in own]
    regions = [
        tuple(slice(at, at + n) for at, n in zip(start, chunk.tensor.shape, strict=True))
        for start, chunk in zip(starts, own, strict=True)
    ]
    for chunk, region in zip(own, regions, strict=True):
        whole[region] = chunk.tensor
    # Every element is on one holder and zero elsewhere: the sum is exact.
    dist.all_reduce(whole, group=mesh.group(Axis.edp, Traffic.data))
    moved = _travel(whole, came_from, mesh)
    for chunk, region in zip(own, regions, strict=True):
        chunk.tensor.copy_(moved[region])


def _travel(rows: Tensor, came_from: Tensor, mesh: Mesh) -> Tensor:
    """``rows`` [E / n, ...] of this rank's slots -> the rows that its slots have from now on."""
    ranks, place = mesh.degree(Axis.ep), mesh.coordinate(Axis.ep)
    size = len(rows)
    target = came_from.argsort()  # where each slot goes: the inverse
    leaving = target[place * size : (place + 1) * size]
    arriving = came_from[place * size : (place + 1) * size]
    order = leaving.argsort()  # rows for one rank in the order of its slots
    sent = torch.bincount(leaving // size, minlength=ranks).tolist()
    received = torch.bincount(arriving // size, minlength=ranks).tolist()
    there = all_to_all(rows.index_select(0, order), sent, received, mesh.group(Axis.ep, Traffic.tokens)).wait()
    slots = (arriving // size).argsort(stable=True)  # rows come by rank, and from one rank in the order of slots here
    return torch.empty_like(there).index_copy_(0, slots, there)
