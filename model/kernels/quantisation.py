"""Quantisation by tiles and blocks: read in any strides, written with what is summed over side by side.

    _quantise        x [B, R, C]              -> values [B, R, C], scales [B, tiles of R, tiles of C]
    _quantise_runs   x [P, C], runs of rows   -> values [C, S], scales [C, S / depth]: along rows, for weight gradients

A program takes whole tiles. In ``_quantise_runs`` each run begins with a tile of its own: run e has
ceil(rows / depth) of them, and S has room for any division of P rows into E runs; what is left over is never read.
There x may itself be quantised by tiles of columns: its values are widened on the way in.

The reference is ``model.fp8.quantise``, to the bit. Never run on a GPU; docs/kernels.md says what was checked instead.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.fp8 import Format, Quantised, Scaling
from model.kernels.tile import Runs, Shared, divide, find_run, find_scales


class Area(NamedTuple):
    """Rows and columns that a program takes at a time; powers of two."""

    rows: int
    columns: int
    warps: int = 4


# For rows that lie side by side in memory, columns that do, blocks; and for runs, as many columns as fill a line.
WIDE, TALL, BLOCK, RUN = Area(16, 128), Area(64, 128, 16), Area(128, 128, 16), Area(128, 64, 8)


class _Memory(NamedTuple):
    x: Tensor
    x_scales: Tensor | None  # of x, if that is quantised
    out: Tensor
    out_scales: Tensor


class _Size(NamedTuple):
    rows: int
    columns: int
    row_step: int  # elements of x from one to the next
    column_step: int
    batch_step: int


class _RunsSize(NamedTuple):
    columns: int
    row_step: int
    column_step: int
    slots: int  # elements of a row of what is written


class _Way(NamedTuple):
    """Of quantising runs: scales, columns of x that share one already (0: x is wide), room for the number of runs."""

    shared: Shared
    share: int
    most: int


@triton.jit
def _quantise(memory, size, area: tl.constexpr, shared: tl.constexpr):  # type: ignore[no-untyped-def]
    across = tl.cdiv(size.columns, area.columns)
    t, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = t // across * area.rows + tl.arange(0, area.rows)
    columns = t % across * area.columns + tl.arange(0, area.columns)
    inside = (rows < size.rows)[:, None] & (columns < size.columns)[None, :]
    places = rows[:, None].to(tl.int64) * size.row_step + columns[None, :].to(tl.int64) * size.column_step
    x = tl.load(memory.x + batch * size.batch_step + places, mask=inside, other=0.0).to(tl.float32)
    scales = find_scales(x, shared)
    values = divide(x, scales, shared).to(memory.out.dtype.element_ty)
    places = (batch * size.rows + rows[:, None]) * size.columns + columns[None, :]
    tl.store(memory.out + places, values, mask=inside)
    down: tl.constexpr = area.rows // shared.rows
    over: tl.constexpr = area.columns // shared.columns
    height, width = tl.cdiv(size.rows, shared.rows), tl.cdiv(size.columns, shared.columns)
    r, c = t // across * down + tl.arange(0, down), t % across * over + tl.arange(0, over)
    places = (batch * height + r[:, None]) * width + c[None, :]
    tl.store(memory.out_scales + places, scales, mask=(r < height)[:, None] & (c < width)[None, :])


@triton.jit
def _quantise_runs(memory, runs, size, area: tl.constexpr, way: tl.constexpr):  # type: ignore[no-untyped-def]
    across = tl.cdiv(size.columns, area.columns)
    t = tl.program_id(0) // across
    run, row, end = find_run(runs, t, area.rows, way.most)
    if run < runs.number:
        rows = row + tl.arange(0, area.rows)
        columns = tl.program_id(0) % across * area.columns + tl.arange(0, area.columns)
        real = columns < size.columns
        inside = (rows < end)[:, None] & real[None, :]
        places = rows[:, None].to(tl.int64) * size.row_step + columns[None, :].to(tl.int64) * size.column_step
        x = tl.load(memory.x + places, mask=inside, other=0.0).to(tl.float32)
        if way.share > 0:
            places = rows[:, None].to(tl.int64) * tl.cdiv(size.columns, way.share) + columns[None, :] // way.share
            x *= tl.load(memory.x_scales + places, mask=inside, other=0.0)
        scales = find_scales(x, way.shared)
        values = divide(x, scales, way.shared).to(memory.out.dtype.element_ty)
        first = columns.to(tl.int64) * size.slots + t * area.rows
        tl.store(memory.out + first[None, :] + tl.arange(0, area.rows)[:, None], values, mask=real[None, :])
        first = columns.to(tl.int64) * (size.slots // area.rows) + t
        tl.store(memory.out_scales + first[None, :] + tl.arange(0, 1)[:, None], scales, mask=real[None, :])


def quantise(x: Tensor, scaling: Scaling, form: Format, area: Area | None = None) -> Quantised:
    """x [..., R, C] in any strides, by tiles of its last two dims, powers of two of at most 128 -> contiguous."""
    rows, columns = x.shape[-2:]
    shared = Shared(*scaling.tile, scaling.powers, form.maximum)
    area = area or choose_area(x, scaling)
    flat = x.reshape(x.shape[:-2].numel(), rows, columns)
    height, width = triton.cdiv(rows, shared.rows), triton.cdiv(columns, shared.columns)
    values = torch.empty(x.shape, dtype=form.dtype, device=x.device)
    scales = torch.empty(*x.shape[:-2], height, width, dtype=torch.float32, device=x.device)
    if values.numel():
        batch_step, row_step, column_step = flat.stride()
        size = _Size(rows, columns, row_step, column_step, batch_step)
        grid = (triton.cdiv(rows, area.rows) * triton.cdiv(columns, area.columns), len(flat))
        _quantise[grid](
            _Memory(flat, None, values, scales), size, area, shared, num_warps=area.warps, enable_fp_fusion=True
        )
    return Quantised(values, scales, scaling.tile)


def choose_area(x: Tensor, scaling: Scaling) -> Area:
    """What a program takes of x: whole tiles, and lines of memory on the side that is read."""
    if scaling.tile[0] > 1:
        return BLOCK
    return WIDE if x.stride(-1) == 1 else TALL


def quantise_runs(x: Tensor | Quantised, ends: Tensor, depth: int, shared: tuple[bool, Format]) -> Quantised:
    """x [P, C] along the rows of each run, ``depth`` of which share a scale -> [C, S], [C, S / depth].

    ``shared``: whether scales are powers of two, and the format. Runs end at ``ends`` [E] int32, ascending.
    """
    powers, form = shared
    rows, x_scales, share = (x, None, 0) if isinstance(x, Tensor) else (x.values, x.scales, x.tile[1])
    length, width = rows.shape
    tiles, area = count_tiles(length, len(ends), depth), RUN._replace(rows=depth)
    values = torch.empty(width, tiles * depth, dtype=form.dtype, device=rows.device)
    scales = torch.empty(width, tiles, dtype=torch.float32, device=rows.device)
    if values.numel():
        _quantise_runs[(tiles * triton.cdiv(width, area.columns),)](
            _Memory(rows, x_scales, values, scales),
            Runs(ends, len(ends)),
            _RunsSize(width, rows.stride(0), rows.stride(1), tiles * depth),
            area,
            _Way(Shared(depth, 1, powers, form.maximum), share, triton.next_power_of_2(len(ends))),
            num_warps=area.warps,
            enable_fp_fusion=True,
        )
    return Quantised(values, scales, (1, depth))


def count_tiles(rows: int, runs: int, length: int) -> int:
    """At most this many tiles of ``length`` rows have ``rows`` in ``runs``."""
    return (rows + runs * (length - 1)) // length
