"""Who owns what of parameters that lie end to end in one buffer: arithmetic, and nothing else.

    slots      | a [4, 3] ....... | b [5] ..... | c [2, 6] ......... |     every parameter starts aligned
    buckets    |             0                  |         1          |     whole parameters, up to so many bytes
    cuts       |    rank 0    |     rank 1      |  rank 0 |  rank 1  |     of each bucket, one piece a holder

Cuts fall between rows only (a row is a run along a parameter's last dim; of a vector, an element), as near to even as
rows allow, so that what a rank owns of a parameter is a few rectangles. All of it is a pure function of the shapes, the
number of holders and the size of a bucket.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

ALIGNMENT = 64  # elements: every parameter starts on a boundary that vector and tensor-core loads like


class Slot(NamedTuple):
    """A parameter's place in the buffer, in elements."""

    start: int
    stop: int
    row: int  # elements


class Rectangle(NamedTuple):
    """A part of a tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]


def lay_out(shapes: Sequence[Sequence[int]]) -> list[Slot]:
    """Tensors of ``shapes`` end to end."""
    slots, end = [], 0
    for shape in shapes:
        slots.append(Slot(end, end + math.prod(shape), shape[-1] if len(shape) > 1 else 1))
        end = align(slots[-1].stop)
    return slots


def align(end: int) -> int:
    """The first element at or behind ``end`` where a parameter may start."""
    return -(-end // ALIGNMENT) * ALIGNMENT


def fill_buckets(slots: Sequence[Slot], limit: int) -> list[list[Slot]]:
    """Neighbouring slots of together at most ``limit`` elements, or a single one that is larger."""
    buckets: list[list[Slot]] = []
    for slot in slots:
        if buckets and align(slot.stop) - buckets[-1][0].start <= limit:
            buckets[-1].append(slot)
        else:
            buckets.append([slot])
    return buckets


def cut_rows(bucket: Sequence[Slot], degree: int) -> list[range]:
    """The pieces of a bucket, one for each of ``degree`` holders: contiguous, some of them empty if rows are few."""
    first, end = bucket[0].start, align(bucket[-1].stop)
    cuts = [_nearest(bucket, first + (end - first) * place // degree) for place in range(1, degree)]
    return [range(start, stop) for start, stop in pairwise([first, *cuts, end])]


def _nearest(bucket: Sequence[Slot], at: int) -> int:
    """The start of a row next to ``at``; it never decreases as ``at`` grows."""
    slot = bucket[bisect_right(bucket, at, key=lambda slot: slot.start) - 1]
    row = slot.start + (2 * (at - slot.start) + slot.row) // (2 * slot.row) * slot.row
    return row if row < slot.stop else align(slot.stop)


def find_rectangles(shape: Sequence[int], part: range) -> Iterator[Rectangle]:
    """Whole rows of a tensor of ``shape``, the elements ``part`` of it in its own order, as rectangles."""
    if len(shape) < 2:
        yield Rectangle((part.start,) * len(shape), (len(part),) * len(shape))
        return
    for offset, extent in _boxes(tuple(shape[:-1]), part.start // shape[-1], part.stop // shape[-1]):
        yield Rectangle((*offset, 0), (*extent, shape[-1]))


def cut_range(shape: Sequence[int], part: range) -> Iterator[Rectangle]:
    """The same, for a ``part`` that may begin and end inside of rows."""
    row = shape[-1]
    cuts = {part.start, min(-(-part.start // row) * row, part.stop), max(part.stop // row * row, part.start), part.stop}
    for start, stop in pairwise(sorted(cuts)):
        if start % row == 0 == stop % row:
            yield from find_rectangles(shape, range(start, stop))
            continue
        place, before = start // row, []
        for size in reversed(shape[:-1]):
            before.append(place % size)
            place //= size
        yield Rectangle((*reversed(before), start % row), (*(1 for _ in before), stop - start))


def _boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Rectangle]:
    """Elements ``start`` to ``stop`` of ``shape``: the end of one index, whole indices, the beginning of another."""
    if len(shape) == 1:
        yield Rectangle((start,), (stop - start,))
        return
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), stop // inner
    if start < first * inner:
        before = (first - 1) * inner
        yield from _under(first - 1, _boxes(shape[1:], start - before, min(stop - before, inner)))
    if first < last:
        yield Rectangle((first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:]))
    if max(start, last * inner) < stop and first <= last:
        yield from _under(last, _boxes(shape[1:], 0, stop - last * inner))


def _under(index: int, boxes: Iterator[Rectangle]) -> Iterator[Rectangle]:
    return (Rectangle((index, *offset), (1, *extent)) for offset, extent in boxes)
