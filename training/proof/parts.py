"""Tensors by name, of which every rank holds its part: reduced over the ranks that hold the same part."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Mesh
from parallel.placement import Shard
from parallel.traffic import Traffic

Parts = Mapping[str, Tensor]


def reduce_parts(
    parts: Parts, shards: Mapping[str, Shard], mesh: Mesh, op: dist.ReduceOp.RedOpType
) -> dict[str, Tensor]:
    """Each part reduced over the ranks that hold it, all parts of the same holders in one message."""
    reduced: dict[str, Tensor] = {}
    for axis in sorted({shards[name].placement.holders for name in parts}):
        names = [name for name in parts if shards[name].placement.holders is axis]
        joined = torch.cat([parts[name].flatten() for name in names])
        dist.all_reduce(joined, op, mesh.group(axis, Traffic.data))
        split = joined.split([parts[name].numel() for name in names])
        reduced |= {name: part.view_as(parts[name]) for name, part in zip(names, split, strict=True)}
    return {name: reduced[name] for name in parts}
