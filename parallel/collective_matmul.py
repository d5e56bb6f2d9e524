"""Products on either side of an exchange: all-gather, then product; product, then reduce-scatter. One operation each.

    joined   | exchange                | product of all rows     |    one waits for the other
    blocks   | own rows | next | next | next |                        a product a block of rows, while
             |  next ...| next | next |                               another block travels
    fused    the same by torch's symmetric memory: peers' blocks are read over NVLink by copy engines

Blocks are the collective matmul of Wang et al. (ASPLOS 2023), but not its ring: in step i a rank sends to, and receives
from, those i places away. A ring would send as much, but every hop of a sum would be rounded. Here blocks of partial
sums go straight to their owner, who adds them in rank order and rounds once; a gather needs no neighbour to pass blocks
on. In each step a rank has one block coming and one going, so that blocks arrive one after the other, not all at last.

Shapes: n ranks; shards [B, s, *] and wholes [B, n s, *] of sequences; weights [I, O]. Of several tensors, the first
ones are multiplied, each by its weight; the others are only gathered or summed, in the same messages.
"""

import math
from collections.abc import Callable, Sequence
from enum import StrEnum
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from model.product import matmul_into
from parallel.collectives import all_gather, sum_scatter
from parallel.doing import doing

Product = Callable[[Tensor, Tensor, Tensor], object]  # x [R, I], weight [I, O], result [R, O] to be filled
Tensors = Sequence[Tensor]


def multiply(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """x [R, I], weight [I, O] -> ``out`` [R, O]."""
    matmul_into(out, x, weight)


@doing("activations of tp")
def gather(shards: Tensors, group: dist.ProcessGroup) -> list[Tensor]:
    """Each [B, s, *] -> [B, n s, *], in one all-gather."""
    sizes = [shard.numel() for shard in shards]
    parts = all_gather(_join(shards), group).wait().split(sizes, dim=1)  # [n, B s *] each
    wholes = [
        part.unflatten(1, shard.shape).transpose(0, 1).flatten(1, 2) for part, shard in zip(parts, shards, strict=True)
    ]
    return [whole.contiguous() for whole in wholes]


@doing("activations of tp")
def scatter(partials: Tensors, group: dist.ProcessGroup) -> list[Tensor]:
    """Each [B, n s, *] -> the sum over ranks of [B, s, *], in one reduce-scatter."""
    parts = [whole.unflatten(1, (group.size(), -1)).transpose(0, 1) for whole in partials]  # [n, B, s, *] each
    summed = sum_scatter(torch.cat([part.flatten(1) for part in parts], dim=1), group).wait()
    return _cut(summed, [part.shape[1:] for part in parts])


def gather_joined(
    shards: Tensors, weights: Tensors, group: dist.ProcessGroup, product: Product = multiply
) -> list[Tensor]:
    """The wholes of ``shards``, then the products of the first ones, [B, n s, O]."""
    wholes = gather(shards, group)
    return wholes + [_multiply_all(whole, weight, product) for whole, weight in zip(wholes, weights, strict=False)]


def scatter_joined(
    wholes: Tensors, weights: Tensors, group: dist.ProcessGroup, product: Product = multiply
) -> list[Tensor]:
    """This rank's shard of the sum over ranks of the products of the first ``wholes`` and of the others as they are."""
    products = [_multiply_all(whole, weight, product) for whole, weight in zip(wholes, weights, strict=False)]
    return scatter([*products, *wholes[len(weights) :]], group)


def gather_blocks(
    shards: Tensors, weights: Tensors, group: dist.ProcessGroup, product: Product = multiply, into: Tensors = ()
) -> list[Tensor]:
    """``gather_joined``, multiplying blocks while others travel. Products go ``into`` what is given."""
    n, place = group.size(), group.rank()
    wholes = [shard.new_empty(shard.shape[0], n * shard.shape[1], *shard.shape[2:]) for shard in shards]
    products = into or [
        whole.new_empty(*whole.shape[:-1], weight.shape[1]) for whole, weight in zip(wholes, weights, strict=False)
    ]
    own, leaving = _join(shards), list[dist.Work]()
    _place(own, _blocks(wholes, place, n))
    for step in range(n):
        owner, following = (place + step) % n, (place + step + 1) % n
        room = _make_room(_blocks(wholes, following, n), own)
        swap = _swap(own, (place - step - 1) % n, room, following, group) if step + 1 < n else []
        blocks, results = _blocks(wholes, owner, n), _blocks(products, owner, n)
        for block, weight, result in zip(blocks, weights, results, strict=False):
            _multiply_block(block, weight, result, product)
        if swap:
            swap[0].wait()
            leaving += swap[1:]
            _place(room, _blocks(wholes, following, n))
    for work in leaving:
        work.wait()
    return [*wholes, *products]


def scatter_blocks(
    wholes: Tensors, weights: Tensors, group: dist.ProcessGroup, product: Product = multiply
) -> list[Tensor]:
    """``scatter_joined``, multiplying blocks while those before them travel; of the same products, the same bits."""
    n, place = group.size(), group.rank()
    ends = [weight.shape[1:] for weight in weights] + [whole.shape[2:] for whole in wholes[len(weights) :]]
    shapes = [torch.Size((whole.shape[0], whole.shape[1] // n, *end)) for whole, end in zip(wholes, ends, strict=True)]
    sizes = [shape.numel() for shape in shapes]
    summands = wholes[0].new_empty(n, sum(sizes))
    works = list[dist.Work]()
    for step in range(1, n + 1):
        owner, source = (place + step) % n, (place - step) % n
        summand = summands[place] if owner == place else torch.empty_like(summands[place])
        for part, block, weight in zip_longest(summand.split(sizes), _blocks(wholes, owner, n), weights):
            if weight is None:
                part.view(block.shape).copy_(block)
            else:
                product(block.flatten(0, 1), weight, part.view(-1, weight.shape[1]))
        if owner != place:
            works += _swap(summand, owner, summands[source], source, group)
    for work in works:
        work.wait()
    # Narrow dtypes are added in float32 and rounded once.
    return _cut(summands.sum(0), shapes)


def gather_fused(
    shards: Tensors, weights: Tensors, group: dist.ProcessGroup, product: Product = multiply, into: Tensors = ()
) -> list[Tensor]:
    """``gather_blocks`` by ``torch.ops.symm_mem``. Has never run on a GPU; ``product`` is torch's own."""
    made = [
        torch.ops.symm_mem.fused_all_gather_matmul(shard, [weight], 1, group.group_name)
        for shard, weight in zip(shards, weights, strict=False)
    ]
    others = shards[len(weights) :]
    wholes = [whole for whole, _ in made] + (gather(others, group) if others else [])
    for given, (_, (result,)) in zip(into, made, strict=False):
        given.copy_(result)
    return [tensor.contiguous() for tensor in (*wholes, *(result for _, (result,) in made))]


def scatter_fused(
    wholes: Tensors, weights: Tensors, group: dist.ProcessGroup, product: Product = multiply
) -> list[Tensor]:
    """``scatter_joined`` by ``torch.ops.symm_mem``. Has never run on a GPU; ``product`` is torch's own."""
    summed = [
        torch.ops.symm_mem.fused_matmul_reduce_scatter(whole, weight, "sum", 1, group.group_name)
        for whole, weight in zip(wholes, weights, strict=False)
    ]
    others = wholes[len(weights) :]
    return [shard.contiguous() for shard in summed] + (scatter(others, group) if others else [])


class Operation(StrEnum):
    """How an exchange and its product go together."""

    joined = "joined"
    blocks = "blocks"
    fused = "fused"


class Matmuls(NamedTuple):
    """Both operations in one way."""

    gather: Callable[..., list[Tensor]]
    scatter: Callable[..., list[Tensor]]


MATMULS = {
    Operation.joined: Matmuls(gather_joined, scatter_joined),
    Operation.blocks: Matmuls(gather_blocks, scatter_blocks),
    Operation.fused: Matmuls(gather_fused, scatter_fused),
}


def find_obstacle(device: torch.device, degree: int, ranks_per_node: int) -> str:
    """Why the fused operators cannot run between ``degree`` neighbouring ranks, or nothing if they can.

    Ranks of a machine decide alike, because they ask for the wires between all devices of that machine.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        found = "ROCm" if device.type == "cuda" else device.type
        return f"torch's fused operators are for NVIDIA devices, and this run is on {found}"
    if ranks_per_node % degree:
        return f"they stay inside a machine, and {degree} tp ranks do not, with {ranks_per_node} ranks on each"
    from torch._C._autograd import DeviceType
    from torch._C._distributed_c10d import _detect_dma_connectivity  # type: ignore[attr-defined]

    wires = _detect_dma_connectivity(DeviceType.CUDA, "nvlink").matrix
    if not all(wire for row, wires_of in enumerate(wires) for peer, wire in enumerate(wires_of) if peer != row):
        return "they need NVLink between all devices of a machine"
    return ""


def _join(tensors: Tensors) -> Tensor:
    """One message."""
    flat = [tensor.flatten() for tensor in tensors]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _cut(message: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """The tensors of a message, each with memory of its own."""
    if len(shapes) == 1:
        return [message.view(shapes[0])]
    parts = message.split([math.prod(shape) for shape in shapes])
    return [part.view(shape).clone() for part, shape in zip(parts, shapes, strict=True)]


def _blocks(wholes: Tensors, owner: int, n: int) -> list[Tensor]:
    """The rows [B, s, *] of a rank's shard: views."""
    return [whole.unflatten(1, (n, -1))[:, owner] for whole in wholes]


def _make_room(blocks: Tensors, like: Tensor) -> Tensor:
    """Where a message may arrive: where it belongs, if it is a single block in one piece."""
    return blocks[0].view(-1) if len(blocks) == 1 and blocks[0].is_contiguous() else torch.empty_like(like)


def _place(message: Tensor, blocks: Tensors) -> None:
    """Puts a message where it belongs, unless it is there."""
    for block, part in zip(blocks, message.split([block.numel() for block in blocks]), strict=True):
        if block.data_ptr() != part.data_ptr():
            block.copy_(part.view(block.shape))


def _multiply_all(x: Tensor, weight: Tensor, product: Product) -> Tensor:
    """[..., I] -> [..., O]."""
    out = x.new_empty(*x.shape[:-1], weight.shape[1])
    product(x.flatten(0, -2), weight, out.view(-1, weight.shape[1]))
    return out


def _multiply_block(block: Tensor, weight: Tensor, result: Tensor, product: Product) -> None:
    """[B, s, I] -> ``result`` [B, s, O], which of several sequences is not in one piece."""
    if result.is_contiguous():
        product(block.flatten(0, 1), weight, result.view(-1, weight.shape[1]))
    else:
        result.copy_(_multiply_all(block, weight, product))


def _swap(sent: Tensor, target: int, room: Tensor, source: int, group: dist.ProcessGroup) -> list[dist.Work]:
    """Starts to send to one rank of ``group`` and to receive from one: works of which the first is that of arrival."""
    if not _batches(group):
        # Asked directly, the group spares checks that take as long as the calls themselves.
        return [group.recv([room], source, 0), group.send([sent], target, 0)]
    return dist.batch_isend_irecv(
        [
            dist.P2POp(dist.irecv, room, group=group, group_peer=source),
            dist.P2POp(dist.isend, sent, group=group, group_peer=target),
        ]
    )


def _batches(group: dist.ProcessGroup) -> bool:
    """Whether what is sent and received at once has to be one call."""
    return dist.get_backend(group) != dist.Backend.GLOO
