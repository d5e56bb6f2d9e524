"""The whole of a model's tensors on rank 0, one after the other, from the parts that the ranks hold.

    rank 0 holds it whole     nothing travels
    split over tp or ep       the ranks of rank 0's group send their parts; others look on
    sharded by the engine     its holders put their part together first

Experts come in the order of their numbers, whatever slots they are in. At any time a rank holds one tensor besides its
model.
"""

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.exchange import find_exchanges
from parallel.mesh import Mesh, Traffic
from parallel.placement import Shard, cut
from parallel.topology import Axis

CHANNELS = {Axis.tp: Traffic.tensor, Axis.ep: Traffic.tokens}


@torch.no_grad()
def gather_whole(
    model: nn.Module, shards: Mapping[str, Shard], dtypes: Mapping[str, torch.dtype], mesh: Mesh
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer by name, in its dtype of ``dtypes``: on rank 0 a copy in host memory, elsewhere empty.

    A buffer is whole on every rank. Collective over all ranks.
    """
    places = {f"{name}.experts": exchange.places.cpu() for name, exchange in find_exchanges(model).items()}
    for name, tensor in name_tensors(model).items():
        shard, part = shards.get(name), tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if shard is not None and shard.shape != shard.global_shape:
            whole = _collect(part.to(dtypes[name]), shard, mesh)
            slots = places.get(name.partition(".routed.")[0])
            yield name, whole if slots is None or mesh.rank != 0 else whole.index_select(0, slots)
        else:
            yield name, part.to("cpu", dtypes[name], copy=True) if mesh.rank == 0 else part.new_empty(0)


def name_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, detached; one that is used twice has one name."""
    return {name: t.detach() for name, t in (*model.named_parameters(), *model.named_buffers())}


def _collect(part: Tensor, shard: Shard, mesh: Mesh) -> Tensor:
    axis = shard.placement.axis
    assert axis is not None
    ranks, group = mesh.topology.group(0, axis), mesh.group(axis, CHANNELS[axis])
    if mesh.rank in ranks[1:]:
        dist.send(part.contiguous(), 0, group=group)
    if mesh.rank != 0:
        return part.new_empty(0)
    whole = torch.empty(shard.global_shape, dtype=part.dtype)
    for rank in ranks:
        theirs = cut(shard.global_shape, shard.placement, mesh.topology, rank)
        received = part
        if rank != 0:
            received = torch.empty(theirs.shape, dtype=part.dtype, device=part.device)
            dist.recv(received, rank, group=group)
        whole[theirs.slices] = received.cpu()
    return whole
