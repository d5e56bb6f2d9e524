"""Parameters of one dtype, one weight decay and the same holders, end to end: who holds what of their storage.

    weights    | ............................... |     the parameters' dtype; every parameter is a slice
    gradients  | ............................... |     float32, or wider where the parameters are
    masters    | own |                                 the gradients' dtype
    m, v       | own |                                 the same, or bfloat16

Weights and gradients are there in full. Of masters and moments a rank has its own piece of every bucket
(training/pieces.py), one holder among n about 1/n of them. Where weights have the masters' dtype, a master *is* a piece
of the weights.

Buckets travel one by one, and whoever has the slab says when: a bucket that has started takes no more gradients.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from parallel.mesh import Mesh
from parallel.placement import Shard
from parallel.reduce import Finish, gather_pieces, reduce_pieces
from training.beside import Start
from training.chunk import Chunk
from training.optimizer import Part
from training.pieces import Slot, align, cut_rows, fill_buckets, find_rectangles, lay_out


class Entry(NamedTuple):
    """A parameter, its global name, and which part of the whole this rank holds."""

    name: str
    parameter: nn.Parameter
    shard: Shard


class Bucket(NamedTuple):
    """Parameters of a slab that travel together."""

    slab: "Slab"
    number: int  # in the slab
    first: int  # of its parameters, the one that comes first in the model: its place there
    parameters: tuple[nn.Parameter, ...]

    def is_started(self) -> bool:
        """Whether the sum of its gradients has started in this step."""
        return self.slab.is_started(self.number)

    def close(self) -> Start:
        """See ``Slab.close``."""
        return self.slab.close(self.number)

    def publish(self) -> Finish:
        """See ``Slab.publish``."""
        return self.slab.publish(self.number)


class Slab:
    """Their weights, gradients and state on this rank."""

    def __init__(self, entries: Sequence[Entry], mesh: Mesh, decay: float, narrow: bool, bucket_bytes: int) -> None:
        """``narrow`` keeps moments in bfloat16. The parameters' storage moves into the slab."""
        self._entries, self._group, self._decay = entries, mesh.holders(entries[0].shard), decay
        self._places = {entry.parameter: place for place, entry in enumerate(entries)}
        self.crosses = bool(entries[0].shard.across)  # whether other pipeline ranks hold it too
        self._slots = lay_out([entry.parameter.shape for entry in entries])
        dtype, device = entries[0].parameter.dtype, entries[0].parameter.device
        master = torch.promote_types(dtype, torch.float32)
        size = align(self._slots[-1].stop)
        self._weights = torch.zeros(size, dtype=dtype, device=device)
        self._grads = torch.zeros(size, dtype=master, device=device)
        self.degree, place = self._group.size(), self._group.rank()
        # A single holder has nothing to send: everything is one bucket.
        limit = bucket_bytes // self._grads.itemsize if self.degree > 1 else size
        filled = fill_buckets(self._slots, limit)
        self._buckets = [cut_rows(bucket, self.degree) for bucket in filled]
        self._bucket_of = [number for number, bucket in enumerate(filled) for _ in bucket]
        self._own = [bucket[place] for bucket in self._buckets]
        owned = sum(map(len, self._own))
        self._wide = dtype == master
        masters = None if self._wide else torch.zeros(owned, dtype=master, device=device)
        moment = torch.bfloat16 if narrow else master
        m, v = (torch.zeros(owned, dtype=moment, device=device) for _ in range(2))
        self.parts = list(self._cut_parts(masters, m, v))
        self._touched: set[int] = set()  # parameters with a gradient in this step
        self._started: set[int] = set()  # buckets whose sums have started in this step
        self._take_over()

    def buckets(self, order: Mapping[str, int]) -> Iterator[Bucket]:
        """Its buckets; ``order`` has every parameter's place in the model."""
        for number in range(len(self._buckets)):
            members = [self._entries[place] for place in self._members(number)]
            first = min(order[entry.name] for entry in members)
            yield Bucket(self, number, first, tuple(entry.parameter for entry in members))

    def begin(self) -> None:
        """Forgets the gradients."""
        self._touched.clear()
        self._started.clear()

    @torch.no_grad()
    def accumulate(self, parameter: nn.Parameter, grad: Tensor) -> None:
        """Adds to the gradient of ``parameter``. Raises RuntimeError if the sum over its holders has started."""
        place = self._places[parameter]
        if self._bucket_of[place] in self._started:
            raise RuntimeError(f"{self._entries[place].name} got a gradient after the sum over its holders had started")
        total = _view(self._grads, self._slots[place], grad)
        if place in self._touched:
            total.add_(grad)
        else:
            total.copy_(grad)
            self._touched.add(place)

    def is_started(self, bucket: int) -> bool:
        """Whether the sum of a bucket has started in this step."""
        return bucket in self._started

    @torch.no_grad()
    def close(self, bucket: int) -> Start:
        """A bucket's gradients are complete, for there will be no other. Returns what launches their sum over the
        holders, into its owner's piece: in this thread or in another.
        """
        self._started.add(bucket)
        for place in self._members(bucket):
            if place not in self._touched:
                # Other holders may have a gradient.
                self._grads[self._slots[place].start : self._slots[place].stop].zero_()
        return lambda: reduce_pieces(self._grads, self._buckets[bucket], self._group)

    def publish(self, bucket: int) -> Finish:
        """Launches the copy of a bucket's weights to all holders."""
        return gather_pieces(self._weights, self._buckets[bucket], self._group)

    def count_bytes(self) -> int:
        """Bytes of all its buffers."""
        owned = (tensor for part in self.parts for tensor in (part.m, part.v, None if self._wide else part.master))
        return self._weights.nbytes + self._grads.nbytes + sum(tensor.nbytes for tensor in owned if tensor is not None)

    def cast(self) -> None:
        """Sets the owned weights from their masters."""
        for part in self.parts:
            if part.weight is not None:
                part.weight.copy_(part.master)

    def chunks(self) -> Iterator[Chunk]:
        """Masters and moments as rectangles of the whole parameters."""
        for own, part in zip(self._own, self.parts, strict=True):
            for entry, slot in zip(self._entries, self._slots, strict=True):
                here = range(max(own.start, slot.start), min(own.stop, slot.stop))
                if here:
                    yield from self._cut_chunks(
                        entry, slot, here, part.cut(here.start - own.start, here.stop - own.start)
                    )

    def _members(self, bucket: int) -> range:
        """The numbers of its parameters."""
        return range(bisect_left(self._bucket_of, bucket), bisect_right(self._bucket_of, bucket))

    def _cut_chunks(self, entry: Entry, slot: Slot, here: range, part: Part) -> Iterator[Chunk]:
        """``part`` are the elements ``here`` of the slab, all of one parameter."""
        at = 0
        inside = range(here.start - slot.start, here.stop - slot.start)
        for rectangle in find_rectangles(entry.shard.shape, inside):
            size = math.prod(rectangle.shape)
            offset = tuple(map(sum, zip(entry.shard.offset, rectangle.offset, strict=True)))
            for kind, tensor in (("master", part.master), ("m", part.m), ("v", part.v)):
                view = tensor[at : at + size].view(rectangle.shape)
                yield Chunk(f"{kind}/{entry.name}", entry.shard.global_shape, offset, view)
            at += size

    def _cut_parts(self, masters: Tensor | None, m: Tensor, v: Tensor) -> Iterator[Part]:
        at = 0
        for own in self._own:
            here, there = slice(at, at + len(own)), slice(own.start, own.stop)
            weight = self._weights[there]
            if masters is None:
                yield Part(weight, self._grads[there], m[here], v[here], None, self._decay)
            else:
                yield Part(masters[here], self._grads[there], m[here], v[here], weight, self._decay)
            at += len(own)

    @torch.no_grad()
    def _take_over(self) -> None:
        for entry, slot in zip(self._entries, self._slots, strict=True):
            into = _view(self._weights, slot, entry.parameter)
            into.copy_(entry.parameter)
            entry.parameter.data = into
        for part in self.parts:
            if part.weight is not None:
                part.master.copy_(part.weight)


def _view(buffer: Tensor, slot: Slot, like: Tensor) -> Tensor:
    return buffer[slot.start : slot.stop].view(like.shape)
