"""Products of 8 bits: short sums by the matrix units, promoted to float32 with their scales after every tile of K.

    y = a b^T          a [M, K], its scales [M, K / c]          b [N, K], its scales [N / r, K / c],  r = 1 or 128

          K --->   | c values | c values | ...           total += (a tile . b tile) * scale of a * scale of b

    _multiply_rows      a run of rows by its own matrix      a [P, K], b [E, N, K], ends [E]       -> [P, N]
    _multiply_weights   a sum over each run                  g [O, S], x [I, S], tiles of runs     -> [E, O, I]

Without runs the first is an ordinary product. All three products of training are of this form (model/fp8.py): operands
are quantised with K side by side. c is 128, or 32 for microscaling: the promotion that DeepSeek-V3 has every 128 terms
(section 3.3.2), for units that sum in 14 bits, comes with the scales. How the output is cut into tiles changes no
order of sums: configurations may be chosen by speed alone.

Loads are plain ones, which all chips have. Never run on a GPU; docs/kernels.md says what was checked instead.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.fp8 import Quantised
from model.kernels.quantisation import count_tiles
from model.kernels.tile import Runs, Tile, find_run, find_tiles, place


class _Operands(NamedTuple):
    a: Tensor
    a_scales: Tensor
    b: Tensor
    b_scales: Tensor
    out: Tensor


class _Size(NamedTuple):
    rows: int
    columns: int
    depth: int


@triton.jit
def _sum_tiles(a, b, steps, depth, tile: tl.constexpr, shares: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of a by rows of b, over the tiles of K from ``steps[0]`` to ``steps[1]``: [rows, columns] float32.

    a and b are pointers to the first value and the first scale of each of their rows; b's rows may have one for all.
    """
    k = steps[0] * tile.depth + tl.arange(0, tile.depth)
    left, right = a[0][:, None] + k[None, :], b[0][:, None] + k[None, :]
    total = tl.full((tile.rows, tile.columns), 0, tl.float32)
    for step in range(steps[0], steps[1]):
        inside = (step * tile.depth + tl.arange(0, tile.depth) < depth)[None, :]
        product = tl.dot(tl.load(left, mask=inside, other=0.0), tl.load(right, mask=inside, other=0.0).T)
        if shares:
            total += product * (tl.load(a[1] + step) * tl.load(b[1] + step))[:, None]
        else:
            total += product * (tl.load(a[1] + step)[:, None] * tl.load(b[1] + step)[None, :])
        left += tile.depth
        right += tile.depth
    return total


@triton.jit
def _multiply_rows(operands, runs, size, tile: tl.constexpr, block: tl.constexpr, most: tl.constexpr):  # type: ignore[no-untyped-def]
    across, tiles = tl.cdiv(size.columns, tile.columns), tl.cdiv(size.depth, tile.depth)
    t, column = place(tl.program_id(0), tl.num_programs(0) // across, across, 8)
    run, row, end = 0, t * tile.rows, size.rows
    if most > 0:
        run, row, end = find_run(runs, t, tile.rows, most)
        end = tl.where(run < runs.number, end, size.rows)
    if row < end:
        rows, columns = row + tl.arange(0, tile.rows), column * tile.columns + tl.arange(0, tile.columns)
        total = tl.full((tile.rows, tile.columns), 0, tl.float32)
        if run < runs.number:  # else rows after the last run, which are zero
            lines = tl.minimum(rows, end - 1).to(tl.int64)
            others = tl.minimum(columns, size.columns - 1).to(tl.int64)
            shares: tl.constexpr = block % tile.columns == 0
            blocks = column * tile.columns // block if shares else others // block
            blocks += tl.cast(run, tl.int64) * tl.cdiv(size.columns, block)
            others += tl.cast(run, tl.int64) * size.columns
            a = operands.a + lines * size.depth, operands.a_scales + lines * tiles
            b = operands.b + others * size.depth, operands.b_scales + blocks * tiles
            total = _sum_tiles(a, b, (0, tiles), size.depth, tile, shares)
        places = rows[:, None].to(tl.int64) * size.columns + columns[None, :]
        inside = (rows < end)[:, None] & (columns < size.columns)[None, :]
        tl.store(operands.out + places, total.to(operands.out.dtype.element_ty), mask=inside)


@triton.jit
def _multiply_weights(operands, runs, size, tile: tl.constexpr, most: tl.constexpr):  # type: ignore[no-untyped-def]
    down, across = tl.cdiv(size.rows, tile.rows), tl.cdiv(size.columns, tile.columns)
    run = tl.program_id(0) // (down * across)
    row, column = place(tl.program_id(0) % (down * across), down, across, 8)
    rows, columns = row * tile.rows + tl.arange(0, tile.rows), column * tile.columns + tl.arange(0, tile.columns)
    lines = tl.minimum(rows, size.rows - 1).to(tl.int64)
    others = tl.minimum(columns, size.columns - 1).to(tl.int64)
    tiles = size.depth // tile.depth
    a = operands.a + lines * size.depth, operands.a_scales + lines * tiles
    b = operands.b + others * size.depth, operands.b_scales + others * tiles
    total = _sum_tiles(a, b, find_tiles(runs, run, tile.depth, most), size.depth, tile, False)
    places = (tl.cast(run, tl.int64) * size.rows + rows[:, None]) * size.columns + columns[None, :]
    inside = (rows < size.rows)[:, None] & (columns < size.columns)[None, :]
    tl.store(operands.out + places, total.to(operands.out.dtype.element_ty), mask=inside)


def multiply_rows(a: Quantised, b: Quantised, ends: Tensor | None, dtype: torch.dtype, tile: Tile) -> Tensor:
    """a [P, K], b [E, N, K] -> [P, N] in ``dtype``: rows up to ``ends[e]`` by ``b[e]``, rows after the last are zero.

    Without ``ends`` b is [N, K]. Both have their scales along K, a for each row; all are contiguous.
    """
    (rows, depth), columns = a.values.shape, b.values.shape[-2]
    assert a.tile[0] == 1 and a.tile[1] == b.tile[1] == tile.depth and b.values.shape[-1] == depth
    out = torch.empty(rows, columns, dtype=dtype, device=a.values.device)
    runs = Runs(ends, 1 if ends is None else len(ends))
    down = triton.cdiv(rows, tile.rows) if ends is None else count_tiles(rows, runs.number + 1, tile.rows)
    if out.numel():
        _multiply_rows[(down * triton.cdiv(columns, tile.columns),)](
            _Operands(*a[:2], *b[:2], out),
            runs,
            _Size(rows, columns, depth),
            tile,
            b.tile[0],
            0 if ends is None else triton.next_power_of_2(runs.number),
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )
    return out


def multiply_weights(g: Quantised, x: Quantised, ends: Tensor, dtype: torch.dtype, tile: Tile) -> Tensor:
    """g [O, S], x [I, S], as ``quantise_runs`` gives them for runs that end at ``ends`` [E] -> g x^T [E, O, I]."""
    (rows, depth), columns = g.values.shape, len(x.values)
    assert g.tile == x.tile == (1, tile.depth) and x.values.shape[1] == depth
    out = torch.empty(len(ends), rows, columns, dtype=dtype, device=ends.device)
    if out.numel():
        _multiply_weights[(len(ends) * triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)](
            _Operands(*g[:2], *x[:2], out),
            Runs(ends, len(ends)),
            _Size(rows, columns, depth),
            tile,
            triton.next_power_of_2(len(ends)),
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )
    return out
