"""The whole of a model's tensors on rank 0, one after the other, from the parts that the ranks hold.

    split over tp or ep       the ranks of a group send their parts to the first rank of their stage; others look on
    of another stage          its first rank, which has the whole now, sends it to rank 0
    sharded by the engine     its holders put their part together first

Experts come in the order of their numbers, whatever slots they are in. At any time a rank holds one tensor besides its
model.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.build import Shards, Stages
from parallel.exchange import find_exchanges
from parallel.mesh import Mesh, Traffic
from parallel.pipeline.stages import Pipeline
from parallel.placement import Shard, cut
from parallel.topology import Axis

CHANNELS = {Axis.tp: Traffic.tensor, Axis.ep: Traffic.tokens}


@torch.no_grad()
def gather_whole(
    stages: Stages, shards: Shards, pipeline: Pipeline, plain: nn.Module, mesh: Mesh
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer by name: on rank 0 a copy in host memory, elsewhere empty. Collective over all ranks.

    ``plain``: the whole model without memory, for names, shapes and dtypes. A buffer is whole everywhere in its stage.
    """
    config = next(iter(stages.values())).config
    here = find_tensors(stages.values())
    places = {f"{name}.experts": exchange.places.cpu() for name, exchange in find_exchanges(stages.values()).items()}
    for name, like in name_tensors([plain]).items():
        holder = pipeline.across(name, config)[0]
        whole = like.new_empty(0, device="cpu")
        if mesh.coordinate(Axis.pp) == holder:
            part = here[name]
            whole = _collect(complete(part).to(like.dtype), shards.get(name), mesh, holder * mesh.topology.stage_size)
            slots = places.get(name.partition(".routed.")[0])
            whole = whole if slots is None or not whole.numel() else whole.index_select(0, slots)
        yield name, _bring(whole, like, mesh, holder)


def name_tensors(models: Iterable[nn.Module]) -> dict[str, Tensor]:
    """Parameters and buffers of stages by name, detached; one that is used twice has one name."""
    return {name: tensor.detach() for name, tensor in find_tensors(models).items()}


def find_tensors(models: Iterable[nn.Module]) -> dict[str, Tensor]:
    """The same, themselves."""
    return {name: t for model in models for name, t in (*model.named_parameters(), *model.named_buffers())}


def is_cut(tensor: Tensor) -> bool:
    """Whether an engine has cut a parameter over its holders: torch's fully_shard, or DeepSpeed's ZeRO-3."""
    return hasattr(tensor, "full_tensor") or hasattr(tensor, "ds_tensor")


def complete(tensor: Tensor) -> Tensor:
    """A parameter as the layout has it, detached, whatever an engine has cut. Collective over its holders."""
    if not is_cut(tensor):
        return tensor.detach()
    from torch.distributed.tensor import DTensor  # which takes as long to load as all of ours

    if isinstance(tensor, DTensor):
        return tensor.full_tensor().detach()
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([tensor]):
        return tensor.detach().clone()


def _collect(part: Tensor, shard: Shard | None, mesh: Mesh, first: int) -> Tensor:
    """On rank ``first`` of a stage the whole in host memory; elsewhere in the stage empty."""
    if shard is None or shard.shape == shard.global_shape:
        return part.to("cpu", copy=True) if mesh.rank == first else part.new_empty(0, device="cpu")
    axis = shard.placement.axis
    assert axis is not None
    ranks, group = mesh.topology.group(first, axis), mesh.group(axis, CHANNELS[axis])
    if mesh.rank in ranks[1:]:
        dist.send(part.contiguous(), first, group=group)
    if mesh.rank != first:
        return part.new_empty(0, device="cpu")
    whole = torch.empty(shard.global_shape, dtype=part.dtype)
    for rank in ranks:
        theirs = cut(shard.global_shape, shard.placement, mesh.topology, rank)
        received = part
        if rank != first:
            received = torch.empty(theirs.shape, dtype=part.dtype, device=part.device)
            dist.recv(received, rank, group=group)
        whole[theirs.slices] = received.cpu()
    return whole


def _bring(whole: Tensor, like: Tensor, mesh: Mesh, holder: int) -> Tensor:
    """To rank 0, from the first rank of the stage that pipeline rank ``holder`` has."""
    first = holder * mesh.topology.stage_size
    if holder and mesh.rank in (0, first):
        group = mesh.group(Axis.pp, Traffic.pipeline)
        if mesh.rank == first:
            dist.send(whole.to(mesh.device), 0, group=group)
        else:
            received = torch.empty(like.shape, dtype=like.dtype, device=mesh.device)
            dist.recv(received, first, group=group)
            whole = received.cpu()
    return whole if mesh.rank == 0 else whole.new_empty(0)
