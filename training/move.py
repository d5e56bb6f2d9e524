"""Experts change ranks between two steps: their weights and optimizer state travel, and no number changes.

Which rank holds an expert is the exchange's affair alone (``ExpertExchange.places``): routing, gates, biases and loads
speak of experts. What moves is a permutation of slots, for every routed layer, over its ep group:

    each holder's part of master, m and v --> the whole on every holder --> to the rank of the new slot --> its part

one tensor at a time. Moments move with their weights, so that the next update is the one that would have been.
"""

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from model.block import Block
from model.transformer import Transformer
from parallel.collectives import all_to_all
from parallel.exchange import ExpertExchange
from parallel.mesh import Mesh, Traffic
from parallel.placement import Shard
from parallel.topology import Axis
from training.chunk import Chunk
from training.engine import Engine


def find_routed(model: Transformer) -> Iterator[tuple[str, Block, ExpertExchange]]:
    """The blocks whose experts are spread over ranks: name, block, exchange; in the order of ``Losses.load``."""
    for name, module in model.named_modules():
        if isinstance(module, Block) and isinstance(module.exchange, ExpertExchange):
            yield name, module, module.exchange


@torch.no_grad()
def move_experts(
    model: Transformer, shards: Mapping[str, Shard], engine: Engine, orders: Mapping[str, Tensor], mesh: Mesh
) -> None:
    """``orders``: for a block's name, the expert [E] of every slot from now on. Collective; the same on all ranks."""
    exchanges = {name: exchange for name, _, exchange in find_routed(model)}
    travels: dict[str, Tensor] = {}  # for a parameter, the slot [E] that the content of each slot comes from
    for name, order in orders.items():
        came_from = exchanges[name].places[order]
        exchanges[name].places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        travels |= {p: came_from for p in shards if p.startswith(f"{name}.experts.routed.")}
    state = engine.state()
    chunks = [chunk for chunk in state.chunks if _parameter(chunk.name) not in travels]
    for parameter, came in travels.items():
        shard = shards[parameter]
        wide = torch.promote_types(model.get_parameter(parameter).dtype, torch.float32)
        for name in (f"{part}/{parameter}" for part in ("master", "m", "v")):
            whole = _assemble([c for c in state.chunks if c.name == name], shard, wide, mesh)
            chunks.append(Chunk(name, shard.global_shape, shard.offset, _travel(whole, came, mesh)))
    engine.load(state._replace(chunks=chunks))


def _parameter(chunk: str) -> str:
    return chunk.partition("/")[2]


def _assemble(own: list[Chunk], shard: Shard, dtype: torch.dtype, mesh: Mesh) -> Tensor:
    """A rank's part of a tensor of state, whole on each of its holders."""
    whole = torch.zeros(shard.shape, dtype=dtype, device=mesh.device)
    for chunk in own:
        starts = [at - first for at, first in zip(chunk.offset, shard.offset, strict=True)]
        whole[tuple(slice(at, at + n) for at, n in zip(starts, chunk.tensor.shape, strict=True))] = chunk.tensor
    # Every element is on one holder and zero elsewhere: the sum is exact.
    dist.all_reduce(whole, group=mesh.group(Axis.edp, Traffic.data))
    return whole


def _travel(rows: Tensor, came_from: Tensor, mesh: Mesh) -> Tensor:
    """``rows`` [E / n, ...] of this rank's slots -> the rows that its slots have from now on."""
    ranks, place = mesh.degree(Axis.ep), mesh.coordinate(Axis.ep)
    size = len(rows)
    target = torch.empty_like(came_from).scatter_(0, came_from, torch.arange(len(came_from)))  # where each slot goes
    leaving = target[place * size : (place + 1) * size]
    arriving = came_from[place * size : (place + 1) * size]
    order = leaving.argsort()  # rows for one rank in the order of its slots
    sent = torch.bincount(leaving // size, minlength=ranks).tolist()
    received = torch.bincount(arriving // size, minlength=ranks).tolist()
    there = all_to_all(rows.index_select(0, order), sent, received, mesh.group(Axis.ep, Traffic.tokens)).wait()
    slots = (arriving // size).argsort(stable=True)  # rows come by rank, and from one rank in the order of slots here
    return torch.empty_like(there).index_copy_(0, slots, there)
