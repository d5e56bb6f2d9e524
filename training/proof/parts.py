"""Tensors by name, of which every rank holds its part: reduced over the ranks that hold the same part."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.build import Region
from parallel.mesh import Mesh
from parallel.placement import Shard
from training.chunk import Chunk

Parts = Mapping[str, Tensor]


def reduce_parts(
    parts: Parts, shards: Mapping[str, Shard], mesh: Mesh, op: dist.ReduceOp.RedOpType
) -> dict[str, Tensor]:
    """Each part reduced over the ranks that hold it, all parts of the same holders in one message."""
    reduced: dict[str, Tensor] = {}
    alike: dict[Any, list[str]] = {}
    for name in sorted(parts):
        alike.setdefault((shards[name].placement.holders, shards[name].across), []).append(name)
    for _, names in sorted(alike.items()):
        joined = torch.cat([parts[name].flatten() for name in names])
        dist.all_reduce(joined, op, mesh.holders(shards[names[0]]))
        split = joined.split([parts[name].numel() for name in names])
        reduced |= {name: part.view_as(parts[name]) for name, part in zip(names, split, strict=True)}
    return {name: reduced[name] for name in parts}


def locate(chunk: Chunk, shard: Shard) -> Region:
    """Where a chunk lies in a rank's part."""
    return tuple(
        slice(at - corner, at - corner + size)
        for at, corner, size in zip(chunk.offset, shard.offset, chunk.tensor.shape, strict=True)
    )
