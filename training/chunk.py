"""A rectangle of a named tensor, placed in the whole: what state is made of, whatever the layout that holds it."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from model.shards import Index


class Chunk(NamedTuple):
    """A part of the tensor ``name``; shapes and offsets are those of the whole model."""

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: Tensor


def find_region(shape: Sequence[int], index: Index) -> list[range]:
    """What ``index`` leaves of every dim of a tensor of ``shape``."""
    rest = (slice(None),) * (len(shape) - len(index))
    return [
        range(place, place + 1) if isinstance(place, int) else range(size)[place]
        for place, size in zip((*index, *rest), shape, strict=True)
    ]


def fill(own: Iterable[Chunk], given: Iterable[Chunk]) -> list[str]:
    """Copies into every chunk of ``own`` what ``given`` has of it. The names, sorted, of those that miss a part."""
    known: dict[str, list[Chunk]] = {}
    for chunk in given:
        known.setdefault(chunk.name, []).append(chunk)
    return sorted({chunk.name for chunk in own if not copy_into(chunk, known.get(chunk.name, []))})


def intersect(own: Chunk, offset: Sequence[int], shape: Sequence[int]) -> list[range]:
    """What ``own`` and another rectangle of its tensor have in common, in every dim."""
    return [
        range(max(a, b), min(a + m, b + n))
        for a, m, b, n in zip(own.offset, own.tensor.shape, offset, shape, strict=True)
    ]


def copy_into(own: Chunk, given: Iterable[Chunk]) -> bool:
    """Fills ``own`` with what the ``given``, disjoint chunks of its tensor, have of it. False if that is not all."""
    filled = 0
    for other in given:
        if other.global_shape != own.global_shape:
            return False
        common = intersect(own, other.offset, other.tensor.shape)
        filled += math.prod(map(len, common))
        if all(common):
            into, source = (
                chunk.tensor[tuple(slice(r.start - o, r.stop - o) for r, o in zip(common, chunk.offset, strict=True))]
                for chunk in (own, other)
            )
            into.copy_(source)
    return filled == own.tensor.numel()
