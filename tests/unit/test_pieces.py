"""Who owns which rows: every element once, cuts between rows, pieces as even as rows allow, rectangles that tile."""

import random
from itertools import pairwise
from math import prod

import pytest
import torch

from training.pieces import ALIGNMENT, Slot, align, cut_range, cut_rows, fill_buckets, find_rectangles, lay_out

DRAWN = random.Random(0)  # noqa: S311 (shapes)


def draw_shapes(count: int) -> list[tuple[int, ...]]:
    return [tuple(DRAWN.randint(1, 40) for _ in range(DRAWN.randint(1, 3))) for _ in range(count)]


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("limit", [1, 1000, 10**9])
def test_every_element_has_one_owner(degree: int, limit: int) -> None:
    shapes = draw_shapes(30)
    slots = lay_out(shapes)
    buckets = fill_buckets(slots, limit)
    assert [slot for bucket in buckets for slot in bucket] == slots
    end = 0
    for bucket in buckets:
        size = align(bucket[-1].stop) - bucket[0].start
        assert size <= limit or len(bucket) == 1
        pieces = cut_rows(bucket, degree)
        assert len(pieces) == degree and pieces[0].start == end
        assert all(a.stop == b.start for a, b in pairwise(pieces))
        end = pieces[-1].stop
        longest = max(slot.row for slot in bucket) + ALIGNMENT
        assert all(abs(len(piece) - size / degree) <= longest for piece in pieces)
        for piece in pieces[1:]:
            slot = next(slot for slot in reversed(slots) if slot.start <= piece.start)
            assert piece.start >= slot.stop or (piece.start - slot.start) % slot.row == 0
    assert end == align(slots[-1].stop)


def test_slots_start_aligned_and_hold_their_parameters() -> None:
    assert lay_out([(3, 5), (70,), (2, 2, 3)]) == [Slot(0, 15, 5), Slot(64, 134, 1), Slot(192, 204, 3)]


def test_more_holders_than_rows_leave_some_without() -> None:
    pieces = cut_rows(lay_out([(2, 128)]), 4)
    assert [len(piece) for piece in pieces] == [128, 0, 128, 0] or sorted(map(len, pieces)) == [0, 0, 128, 128]


def test_rectangles_tile_the_rows_in_order() -> None:
    for shape in [(7,), (5, 3), (4, 3, 5), (3, 2, 4, 2), (1, 1, 6), (6, 1, 2), *draw_shapes(40)]:
        whole = torch.arange(prod(shape)).view(shape)
        row = shape[-1] if len(shape) > 1 else 1
        rows = prod(shape) // row
        for _ in range(20):
            start, stop = sorted((DRAWN.randint(0, rows) * row, DRAWN.randint(0, rows) * row))
            if start == stop:
                continue
            found = [
                whole[tuple(slice(o, o + n) for o, n in zip(r.offset, r.shape, strict=True))].flatten()
                for r in find_rectangles(shape, range(start, stop))
            ]
            assert torch.equal(torch.cat(found), whole.flatten()[start:stop])
            assert len(found) <= 2 * len(shape) - 1


@pytest.mark.parametrize("shape", [(7,), (1,), (3, 5), (4, 1), (2, 3, 4), (3, 2, 2, 5)], ids=str)
def test_rectangles_are_a_range_that_cuts_rows(shape: tuple[int, ...]) -> None:
    """What DeepSpeed owns of a parameter is such a range, and so is a block of a checkpoint."""
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    generator = random.Random(0)  # noqa: S311 (no secret)
    for _ in range(50):
        start, stop = sorted(generator.choices(range(whole.numel() + 1), k=2))
        found = [
            whole[tuple(slice(first, first + size) for first, size in zip(offset, extent, strict=True))].flatten()
            for offset, extent in cut_range(shape, range(start, stop))
        ]
        assert torch.cat([torch.empty(0, dtype=torch.int64), *found]).tolist() == list(range(start, stop))
