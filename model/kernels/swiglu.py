"""SwiGLU of experts in one pass each way: from what gate and up made to what the next product reads.

    _activate        both [P, 2F], share [P]                    -> both in 8 bits, kept for the backward;
                                                                   hidden = silu(gate) up share, in 8 bits
    _differentiate   g [P, F] of hidden, both in 8 bits, share  -> g of both [P, 2F], hidden [P, F], g of share [P]

Shares are the gates of choices (model/fp8_experts.py), zero for rows that are nobody's. Arithmetic is float32.
Each reads and writes every tensor once: ``2 P F`` values in, ``3 P F`` bytes out, where separate operations would move
hidden, its product and their halves through memory several times.

The reference is ``REFERENCE`` in model/fp8_ops.py. Never run on a GPU; docs/kernels.md says what was checked instead.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.fp8 import Format, Quantised, Scaling
from model.kernels.quantisation import Area
from model.kernels.tile import Shared, divide, find_scales

FORWARD, BACKWARD = Area(16, 128), Area(4, 512)


class _There(NamedTuple):
    both: Tensor
    share: Tensor
    inner: Tensor
    inner_scales: Tensor
    hidden: Tensor
    hidden_scales: Tensor


class _Back(NamedTuple):
    g: Tensor
    inner: Tensor
    inner_scales: Tensor
    share: Tensor
    g_both: Tensor
    hidden: Tensor
    g_share: Tensor


class _Size(NamedTuple):
    rows: int
    columns: int  # F


@triton.jit
def _store(out, x, rows, place, shared: tl.constexpr):  # type: ignore[no-untyped-def]
    """x [rows, columns] in 8 bits, to ``out``: values, scales, their width; ``place``: the first column, and inside."""
    first, inside = place
    scales = find_scales(x, shared)
    line = rows[:, None].to(tl.int64)
    values = divide(x, scales, shared).to(out[0].dtype.element_ty)
    tl.store(out[0] + line * out[2] + first + tl.arange(0, x.shape[1])[None, :], values, mask=inside)
    number: tl.constexpr = x.shape[1] // shared.columns
    tiles = first // shared.columns + tl.arange(0, number)[None, :]
    whole = tl.max(tl.reshape(inside.to(tl.int32), (x.shape[0], number, shared.columns)), 2) > 0
    tl.store(out[1] + line * (out[2] // shared.columns) + tiles, scales, mask=whole)


@triton.jit
def _activate(memory, size, area: tl.constexpr, shared: tl.constexpr):  # type: ignore[no-untyped-def]
    across = tl.cdiv(size.columns, area.columns)
    rows = tl.program_id(0) // across * area.rows + tl.arange(0, area.rows)
    first = tl.program_id(0) % across * area.columns
    columns = first + tl.arange(0, area.columns)
    inside = (rows < size.rows)[:, None] & (columns < size.columns)[None, :]
    places = rows[:, None].to(tl.int64) * (2 * size.columns) + columns[None, :]
    gate = tl.load(memory.both + places, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(memory.both + size.columns + places, mask=inside, other=0.0).to(tl.float32)
    share = tl.load(memory.share + rows, mask=rows < size.rows, other=0.0).to(tl.float32)
    inner = memory.inner, memory.inner_scales, 2 * size.columns
    _store(inner, gate, rows, (first, inside), shared)
    _store(inner, up, rows, (size.columns + first, inside), shared)
    hidden = gate / (1 + tl.exp(-gate)) * up * share[:, None]
    _store((memory.hidden, memory.hidden_scales, size.columns), hidden, rows, (first, inside), shared)


@triton.jit
def _differentiate(memory, size, area: tl.constexpr, c: tl.constexpr):  # type: ignore[no-untyped-def]
    rows = tl.program_id(0) * area.rows + tl.arange(0, area.rows)
    share = tl.load(memory.share + rows, mask=rows < size.rows, other=0.0).to(tl.float32)
    line = rows[:, None].to(tl.int64)
    g_share = tl.full((area.rows,), 0, tl.float32)
    for first in range(0, size.columns, area.columns):
        columns = (first + tl.arange(0, area.columns))[None, :]
        inside = (rows < size.rows)[:, None] & (columns < size.columns)
        g = tl.load(memory.g + line * size.columns + columns, mask=inside, other=0.0).to(tl.float32)
        places, tiles = line * (2 * size.columns) + columns, line * (2 * size.columns // c) + columns // c
        gate = tl.load(memory.inner + places, mask=inside, other=0.0).to(tl.float32)
        gate *= tl.load(memory.inner_scales + tiles, mask=inside, other=0.0)
        up = tl.load(memory.inner + size.columns + places, mask=inside, other=0.0).to(tl.float32)
        up *= tl.load(memory.inner_scales + size.columns // c + tiles, mask=inside, other=0.0)
        open_ = 1 / (1 + tl.exp(-gate))
        hidden = gate * open_ * up
        g_share += tl.sum(g * hidden, 1)
        g *= share[:, None]
        g_gate, g_up = g * up * open_ * (1 + gate * (1 - open_)), g * gate * open_
        tl.store(memory.g_both + places, g_gate.to(memory.g_both.dtype.element_ty), mask=inside)
        tl.store(memory.g_both + size.columns + places, g_up.to(memory.g_both.dtype.element_ty), mask=inside)
        hidden *= share[:, None]
        tl.store(memory.hidden + line * size.columns + columns, hidden.to(memory.hidden.dtype.element_ty), mask=inside)
    tl.store(memory.g_share + rows, g_share, mask=rows < size.rows)


def activate(both: Tensor, share: Tensor, scaling: Scaling, form: Format) -> tuple[Quantised, Quantised]:
    """both [P, 2F] and share [P] -> both and hidden [P, F] by tiles of 1 x c, c dividing F."""
    rows, columns = len(both), both.shape[1] // 2
    c = scaling.tile[1]
    assert scaling.tile[0] == 1 and columns % c == 0 and both.is_contiguous()
    inner, hidden = (
        Quantised(
            torch.empty(rows, width, dtype=form.dtype, device=both.device),
            torch.empty(rows, width // c, dtype=torch.float32, device=both.device),
            scaling.tile,
        )
        for width in (2 * columns, columns)
    )
    grid = (triton.cdiv(rows, FORWARD.rows) * triton.cdiv(columns, FORWARD.columns),)
    if both.numel():
        memory = _There(both, share, *inner[:2], *hidden[:2])
        shared = Shared(*scaling.tile, scaling.powers, form.maximum)
        _activate[grid](memory, _Size(rows, columns), FORWARD, shared, num_warps=FORWARD.warps, enable_fp_fusion=True)
    return inner, hidden


def differentiate(g: Tensor, inner: Quantised, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """g [P, F] of hidden, ``inner`` [P, 2F], share [P] -> g of both [P, 2F], hidden [P, F], g of share [P], float32."""
    (rows, columns), c = g.shape, inner.tile[1]
    assert inner.tile[0] == 1 and columns % c == 0 and g.is_contiguous()
    g_both, hidden = (torch.empty(rows, n, dtype=torch.float32, device=g.device) for n in (2 * columns, columns))
    g_share = torch.empty(rows, dtype=torch.float32, device=g.device)
    if g.numel():
        memory = _Back(g, *inner[:2], share, g_both, hidden, g_share)
        grid = (triton.cdiv(rows, BACKWARD.rows),)
        _differentiate[grid](memory, _Size(rows, columns), BACKWARD, c, num_warps=BACKWARD.warps, enable_fp_fusion=True)
    return g_both, hidden, g_share
