"""Tokens to rows and back, token by token: each is read once, however many experts it visits.

    _enter         tokens [R, H] -- quantised, if they are not -- kept [R, H] and rows [P, H], 8 bits and scales
    _sum_copies    rows [P, H], weights [C]   -> [T, H], the sum of each token's rows, in float32 or float64
    _weigh_back    g [T, H], rows, weights    -> g of rows [P, H], g of weights [C]: the gradient of the second

``slots`` [C] and ``starts`` [T] as in model/exchange.py: the rows of a token's copies, and the first of them. Rows that
are nobody's are zero: programs of their own see to that, for it would cost as much again to clear all. The gradient of
entering is a sum of copies, without weights.

The references are ``Permute`` and ``Unpermute`` there. Never run on a GPU; docs/kernels.md says what was checked.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.exchange import Copies
from model.fp8 import Format, Quantised, Scaling
from model.kernels.quantisation import Area
from model.kernels.tile import Shared, divide, find_scales

LINE = Area(1, 1024)


class _There(NamedTuple):
    tokens: Tensor | None  # unless they have been quantised
    kept: Tensor
    kept_scales: Tensor
    rows: Tensor
    rows_scales: Tensor
    filled: Tensor  # whether a row is somebody's


class _Sum(NamedTuple):
    rows: Tensor
    weights: Tensor | None
    out: Tensor


class _Back(NamedTuple):
    g: Tensor
    rows: Tensor
    weights: Tensor
    g_rows: Tensor
    g_weights: Tensor
    filled: Tensor


class _Copies(NamedTuple):
    slots: Tensor
    starts: Tensor
    number: int  # of slots
    tokens: int


@triton.jit
def _find(copies, token):  # type: ignore[no-untyped-def]
    """The copies of ``token``: the first, and the one after the last."""
    later = token + 1 < copies.tokens
    return tl.load(copies.starts + token), tl.load(copies.starts + token + 1, mask=later, other=copies.number)


@triton.jit
def _enter(memory, copies, width, area: tl.constexpr, shared: tl.constexpr):  # type: ignore[no-untyped-def]
    token, first = tl.program_id(0), tl.program_id(1) * area.columns
    columns = first + tl.arange(0, area.columns)
    inside, tiles = columns < width, tl.cdiv(width, shared.columns)
    number: tl.constexpr = area.columns // shared.columns
    places = first // shared.columns + tl.arange(0, number)
    if token < copies.tokens:
        line = tl.cast(token, tl.int64)
        if memory.tokens is None:
            values = tl.load(memory.kept + line * width + columns, mask=inside)
            scales = tl.load(memory.kept_scales + line * tiles + places, mask=places < tiles)
        else:
            x = tl.load(memory.tokens + line * width + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
            scales = find_scales(x, shared)
            values = tl.reshape(divide(x, scales, shared), (area.columns,)).to(memory.kept.dtype.element_ty)
            scales = tl.reshape(scales, (number,))
            tl.store(memory.kept + line * width + columns, values, mask=inside)
            tl.store(memory.kept_scales + line * tiles + places, scales, mask=places < tiles)
        start, end = _find(copies, token)
        for copy in range(start, end):
            row = tl.load(copies.slots + copy)
            tl.store(memory.rows + row * width + columns, values, mask=inside)
            tl.store(memory.rows_scales + row * tiles + places, scales, mask=places < tiles)
    else:
        row = tl.cast(token, tl.int64) - copies.tokens
        if not tl.load(memory.filled + row):
            nothing = tl.full((area.columns,), 0, tl.float32).to(memory.rows.dtype.element_ty)
            tl.store(memory.rows + row * width + columns, nothing, mask=inside)
            tl.store(
                memory.rows_scales + row * tiles + places, tl.full((number,), 1.0, tl.float32), mask=places < tiles
            )


@triton.jit
def _sum_copies(memory, copies, width, area: tl.constexpr, wide: tl.constexpr):  # type: ignore[no-untyped-def]
    token, columns = tl.program_id(0), tl.program_id(1) * area.columns + tl.arange(0, area.columns)
    inside = columns < width
    total = tl.full((area.columns,), 0, wide)
    start, end = _find(copies, token)
    for copy in range(start, end):
        row = tl.load(copies.slots + copy)
        x = tl.load(memory.rows + row * width + columns, mask=inside, other=0.0).to(wide)
        if memory.weights is not None:
            x *= tl.load(memory.weights + copy).to(wide)
        total += x
    places = tl.cast(token, tl.int64) * width + columns
    tl.store(memory.out + places, total.to(memory.out.dtype.element_ty), mask=inside)


@triton.jit
def _weigh_back(memory, copies, width, area: tl.constexpr, wide: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0)
    kind: tl.constexpr = memory.g_rows.dtype.element_ty
    if token < copies.tokens:
        line = memory.g + tl.cast(token, tl.int64) * width
        start, end = _find(copies, token)
        for copy in range(start, end):
            row = tl.load(copies.slots + copy) * width
            weight = tl.load(memory.weights + copy).to(wide)
            total = tl.full((area.columns,), 0, wide)
            for first in range(0, width, area.columns):
                columns = first + tl.arange(0, area.columns)
                inside = columns < width
                g = tl.load(line + columns, mask=inside, other=0.0).to(wide)
                total += g * tl.load(memory.rows + row + columns, mask=inside, other=0.0).to(wide)
                tl.store(memory.g_rows + row + columns, (g * weight).to(kind), mask=inside)
            tl.store(memory.g_weights + copy, tl.sum(total, 0).to(memory.g_weights.dtype.element_ty))
    else:
        row = tl.cast(token, tl.int64) - copies.tokens
        if not tl.load(memory.filled + row):
            for first in range(0, width, area.columns):
                columns = first + tl.arange(0, area.columns)
                nothing = tl.full((area.columns,), 0, kind)
                tl.store(memory.g_rows + row * width + columns, nothing, mask=columns < width)


def enter(tokens: Tensor | Quantised, copies: Copies, how: tuple[Scaling, Format]) -> tuple[Quantised, Quantised]:
    """tokens [R, H], by tiles of 1 x c, -> themselves and their copies among the rows [P, H]."""
    (scaling, form), (source, slots, starts) = how, copies
    given = tokens.values if isinstance(tokens, Quantised) else tokens
    (held, width), c = given.shape, scaling.tile[1]
    assert scaling.tile[0] == 1 and LINE.columns % c == 0 and given.is_contiguous()
    made = _empty(len(source), width, c, (form, given.device))
    kept = tokens if isinstance(tokens, Quantised) else _empty(held, width, c, (form, given.device))
    if made.values.numel():
        memory = _There(None if kept is tokens else given, *kept[:2], *made[:2], _fill(copies))
        shared = Shared(1, c, scaling.powers, form.maximum)
        grid = held + len(source), triton.cdiv(width, LINE.columns)
        number = _Copies(slots, starts, len(slots), held)
        _enter[grid](memory, number, width, LINE, shared, num_warps=LINE.warps, enable_fp_fusion=True)
    return kept, made


def _empty(rows: int, width: int, c: int, kind: tuple[Format, torch.device]) -> Quantised:
    values = torch.empty(rows, width, dtype=kind[0].dtype, device=kind[1])
    return Quantised(values, torch.empty(rows, triton.cdiv(width, c), dtype=torch.float32, device=kind[1]), (1, c))


def sum_copies(rows: Tensor, slots: Tensor, starts: Tensor, weights: Tensor | None = None) -> Tensor:
    """rows [P, H] -> [T, H], the sum over each token's copies, by ``weights`` [C] if any."""
    (tokens, width), rows = (len(starts), rows.shape[1]), rows.contiguous()
    out = rows.new_empty(tokens, width)
    if out.numel():
        grid = tokens, triton.cdiv(width, LINE.columns)
        memory, copies = _Sum(rows, weights, out), _Copies(slots, starts, len(slots), tokens)
        _sum_copies[grid](memory, copies, width, LINE, _wide(rows), num_warps=LINE.warps, enable_fp_fusion=True)
    return out


def weigh_back(g: Tensor, rows: Tensor, weights: Tensor, copies: Copies) -> tuple[Tensor, Tensor]:
    """g [T, H] of the sum of ``rows`` [P, H] by ``weights`` [C] -> that of rows, and that of weights."""
    (tokens, width), (_, slots, starts) = g.shape, copies
    assert g.is_contiguous() and rows.is_contiguous()
    g_rows, g_weights = torch.empty_like(rows), torch.empty_like(weights)
    if rows.numel():
        memory = _Back(g, rows, weights, g_rows, g_weights, _fill(copies))
        grid, number = (tokens + len(rows),), _Copies(slots, starts, len(slots), tokens)
        _weigh_back[grid](memory, number, width, LINE, _wide(rows), num_warps=LINE.warps, enable_fp_fusion=True)
    return g_rows, g_weights


def _fill(copies: Copies) -> Tensor:
    """Whether each row is somebody's."""
    return torch.zeros_like(copies.source, dtype=torch.bool).index_fill_(0, copies.slots, True)


def _wide(rows: Tensor) -> tl.dtype:
    """What sums are taken in."""
    return tl.float64 if rows.dtype is torch.float64 else tl.float32
