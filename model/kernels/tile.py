"""What the kernels of this folder share: how a program's tile is quantised, and which run of rows it belongs to.

    tile [R, C] float32 ---- r x c values share a scale ----> scales [R / r, C / c], values [R, C] / their scales

    rows   | run 0 . . . | run 1 . | run 2 . . . . . | after the last |     runs end at ``ends`` [E]
    tiles  | 0 . | 1 .   | 2 .     | 3 . | 4 .       | 5 . | ...            no tile has rows of two runs

Magnitudes are compared as integers: the bits of floats without their sign are ordered as the floats are, and infinities
and NaN come after them all, so that nothing which is not finite is passed over (a device's maximum drops NaN).
Never run on a GPU; docs/kernels.md says what was checked instead.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """Rows and columns that a program takes at a time, the step through a sum; powers of two."""

    rows: int = 128
    columns: int = 256
    depth: int = 64
    warps: int = 8
    stages: int = 4  # steps in flight


class Shared(NamedTuple):
    """``model.fp8.Scaling`` and the largest magnitude of a format, as kernels take them."""

    rows: int
    columns: int
    powers: bool
    maximum: float


class Runs(NamedTuple):
    """Runs of rows: where each ends [E] int32, ascending, and E."""

    ends: Tensor | None
    number: int


@triton.jit
def find_scales(x, shared: tl.constexpr):  # type: ignore[no-untyped-def]
    """x [R, C] float32 -> [R / r, C / c]; ``model.fp8.find_scales`` says how."""
    down: tl.constexpr = x.shape[0] // shared.rows
    across: tl.constexpr = x.shape[1] // shared.columns
    magnitudes = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    cut = tl.reshape(magnitudes, (down, shared.rows, across, shared.columns))
    largest = tl.max(tl.max(cut, 3), 1)
    scales = tl.div_rn(largest.to(tl.float32, bitcast=True), tl.full((down, across), shared.maximum, tl.float32))
    bits = tl.maximum(scales.to(tl.int32, bitcast=True), 0x00800000)  # 2^-126, the least normal number
    if shared.powers:
        bits = (bits + 0x007FFFFF) & 0x7F800000
    return tl.where(largest < 0x7F800000, bits, 0x7FC00000).to(tl.float32, bitcast=True)


@triton.jit
def divide(x, scales, shared: tl.constexpr):  # type: ignore[no-untyped-def]
    """x [R, C] by its scales, as ``find_scales`` gives them."""
    down: tl.constexpr = x.shape[0] // shared.rows
    across: tl.constexpr = x.shape[1] // shared.columns
    cut = tl.reshape(x, (down, shared.rows, across, shared.columns))
    wide = tl.broadcast_to(scales[:, None, :, None], (down, shared.rows, across, shared.columns))
    return tl.reshape(tl.div_rn(cut, wide), (x.shape[0], x.shape[1]))


@triton.jit
def _count(runs, length: tl.constexpr, most: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of each run its number, first row, end, and how many tiles of ``length`` rows it has; ``most`` >= all runs."""
    run = tl.arange(0, most)
    end = tl.load(runs.ends + run, mask=run < runs.number, other=0)
    begin = tl.load(runs.ends + run - 1, mask=(run > 0) & (run < runs.number), other=0)
    return run, begin, end, tl.where(run < runs.number, tl.cdiv(end - begin, length), 0)


@triton.jit
def find_run(runs, tile, length: tl.constexpr, most: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tile ``tile`` of ``length`` rows -> its run, its first row, the end of the run.

    A tile after all runs belongs to run ``runs.number``, whose rows follow on the last end.
    """
    run, begin, end, tiles = _count(runs, length, most)
    passed = (run < runs.number) & (tl.cumsum(tiles, 0) <= tile)
    found = tl.sum(passed.to(tl.int32), 0)
    first = tile - tl.sum(tl.where(passed, tiles, 0), 0)
    start = tl.where(found < runs.number, tl.sum(tl.where(run == found, begin, 0), 0), tl.max(end, 0))
    return found, start + first * length, tl.sum(tl.where(run == found, end, 0), 0)


@triton.jit
def find_tiles(runs, run, length: tl.constexpr, most: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first of the tiles of ``run``, and the one after its last."""
    each, _, _, tiles = _count(runs, length, most)
    first = tl.sum(tl.where(each < run, tiles, 0), 0)
    return first, first + tl.sum(tl.where(each == run, tiles, 0), 0)


@triton.jit
def place(tile, down, across, group: tl.constexpr):  # type: ignore[no-untyped-def]
    """Number of an output tile -> its place, so that neighbours in time read the same ``group`` tiles of rows."""
    block = tile // (group * across)
    height = tl.minimum(down - block * group, group)
    inside = tile % (group * across)
    return block * group + inside % height, inside // height
