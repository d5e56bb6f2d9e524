"""What FP8 training computes, as operators: how each runs is one row per device type in ``OPERATORS``.

    quantise         x [..., R, C]                        -> values and scales, by tiles
    multiply         a [M, K], b [N, K]                   -> a b^T [M, N]
    multiply_rows    a [P, K], b [E, N, K], ends          -> y [P, N], each expert's run of rows by its own matrix
    multiply_weights g [P, O], x [P, I], ends             -> g^T x [E, O, I], a sum over each expert's run of rows
    enter            tokens [R, H], in FP8 or not yet     -> tokens and rows [P, H] in FP8; rows of nobody are zero
    activate         both [P, 2F], share [P]              -> both, and hidden = silu(gate) up share [P, F], in FP8
    differentiate    g [P, F], both in FP8, share         -> g of both [P, 2F], hidden [P, F], g of share [P]

Operands of products have their scales along K. Sums over rows have no such tiles yet: ``multiply_weights`` quantises
its operands along rows itself, each run from its first row on. Runs end at ``ends`` [E] int32; rows past the last are
zero in every result. Sums are taken in the dtype of the scales; results are rounded to ``dtype`` once.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from model import fp8
from model.device import kernel
from model.exchange import Copies
from model.fp8 import Quantised, Scaling, dequantise
from model.grouped import PRODUCTS as GROUPED
from model.operator import operator, register_fake


class Operand(NamedTuple):
    """Rows [P, C], and how to quantise their columns [C, P]; what is in FP8 already has lines as long as its tiles."""

    rows: Tensor | Quantised
    scaling: Scaling


class Operators(NamedTuple):
    """All of them on one device type, with the arguments of the functions below."""

    quantise: Callable[[Tensor, Scaling], Quantised]
    multiply: Callable[[Quantised, Quantised, torch.dtype], Tensor]
    rows: Callable[[Quantised, Quantised, Tensor, torch.dtype], Tensor]
    weights: Callable[[Operand, Operand, Tensor, torch.dtype], Tensor]
    enter: Callable[[Tensor | Quantised, Scaling, Copies], tuple[Quantised, Quantised]]
    activate: Callable[[Tensor, Tensor, Scaling], tuple[Quantised, Quantised]]
    differentiate: Callable[[Tensor, Quantised, Tensor], tuple[Tensor, Tensor, Tensor]]


def _multiply(a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
    return (dequantise(a) @ dequantise(b).mT).to(dtype)


def _multiply_rows(a: Quantised, b: Quantised, ends: Tensor, dtype: torch.dtype) -> Tensor:
    # The loop: torch's fused product, on a GPU, is for BF16 alone.
    return GROUPED["cpu"].rows(dequantise(a), dequantise(b).mT, ends).to(dtype)


def _multiply_weights(g: Operand, x: Operand, ends: Tensor, dtype: torch.dtype) -> Tensor:
    left, right = (each.rows if isinstance(each.rows, Tensor) else dequantise(each.rows) for each in (g, x))
    out = torch.zeros(len(ends), left.shape[1], right.shape[1], dtype=dtype, device=ends.device)
    start = 0
    for gradient, end in zip(out, ends.tolist(), strict=True):
        if end > start:
            a, b = (fp8.quantise(rows[start:end].t(), each.scaling) for rows, each in ((left, g), (right, x)))
            gradient.copy_(_multiply(a, b, dtype))
        start = end
    return out


def _enter(tokens: Tensor | Quantised, scaling: Scaling, copies: Copies) -> tuple[Quantised, Quantised]:
    kept = fp8.quantise(tokens, scaling) if isinstance(tokens, Tensor) else tokens
    (values, scales, tile), (source, slots, _) = kept, copies
    empty = torch.ones(len(source), 1, dtype=torch.bool, device=source.device).index_fill_(0, slots, False)
    rows = values.view(torch.uint8).index_select(0, source).masked_fill_(empty, 0).view(values.dtype)
    return kept, Quantised(rows, scales.index_select(0, source // tile[0]), (1, tile[1]))


def _activate(both: Tensor, share: Tensor, scaling: Scaling) -> tuple[Quantised, Quantised]:
    wide = both.to(share.dtype)
    gate, up = wide.chunk(2, dim=1)
    return fp8.quantise(wide, scaling), fp8.quantise(F.silu(gate) * up * share[:, None], scaling)


def _differentiate(g: Tensor, inner: Quantised, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gate, up = dequantise(inner).chunk(2, dim=1)
    opened = F.silu(gate)
    hidden, weighed = opened * up, g * share[:, None]
    g_both = torch.cat((torch.ops.aten.silu_backward(weighed * up, gate), weighed * opened), 1)
    return g_both, hidden * share[:, None], (g * hidden).sum(1)


REFERENCE = Operators(fp8.quantise, _multiply, _multiply_rows, _multiply_weights, _enter, _activate, _differentiate)
OPERATORS = {
    "cpu": REFERENCE,
    "cuda": Operators(*(kernel(f"operators:{name}") for name in Operators._fields)),
}


@operator("shoestring::fp8_quantise")
def _fp8_quantise(x: Tensor, tile: list[int], powers: bool) -> tuple[Tensor, Tensor]:
    values, scales, _ = OPERATORS[x.device.type].quantise(x, Scaling((tile[0], tile[1]), powers))
    return values.contiguous(), scales.contiguous()  # what is summed over lies side by side


@register_fake(_fp8_quantise)
def _(x: Tensor, tile: list[int], powers: bool) -> tuple[Tensor, Tensor]:
    return _outline(x, x.shape, tile)


def _outline(like: Tensor, shape: torch.Size | list[int], tile: list[int]) -> tuple[Tensor, Tensor]:
    """What quantising a tensor of ``shape`` and of the dtype of ``like`` gives."""
    *others, rows, columns = shape
    tiles = [-(-size // min(length, max(size, 1))) for size, length in zip((rows, columns), tile, strict=True)]
    wide = torch.promote_types(like.dtype, torch.float32)
    return like.new_empty(shape, dtype=fp8.find_format(like.device).dtype), like.new_empty(*others, *tiles, dtype=wide)


@operator("shoestring::fp8_multiply")
def _fp8_multiply(operands: list[Tensor], tiles: list[int], dtype: torch.dtype) -> Tensor:
    return OPERATORS[operands[0].device.type].multiply(*_unpack(operands, tiles), dtype)


@register_fake(_fp8_multiply)
def _(operands: list[Tensor], tiles: list[int], dtype: torch.dtype) -> Tensor:
    a, _, b, _ = operands
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


@operator("shoestring::fp8_rows")
def _fp8_rows(operands: list[Tensor], tiles: list[int], ends: Tensor, dtype: torch.dtype) -> Tensor:
    return OPERATORS[ends.device.type].rows(*_unpack(operands, tiles), ends, dtype)


@register_fake(_fp8_rows)
def _(operands: list[Tensor], tiles: list[int], ends: Tensor, dtype: torch.dtype) -> Tensor:
    a, _, b, _ = operands
    return a.new_empty(a.shape[0], b.shape[1], dtype=dtype)


@operator("shoestring::fp8_weights")
def _fp8_weights(
    g: list[Tensor], x: list[Tensor], tiles: list[int], powers: list[bool], ends: Tensor, dtype: torch.dtype
) -> Tensor:
    scalings = Scaling((tiles[0], tiles[1]), powers[0]), Scaling((tiles[2], tiles[3]), powers[1])
    left, right = (
        Operand(rows[0] if len(rows) == 1 else Quantised(rows[0], rows[1], (1, scaling.tile[1])), scaling)
        for rows, scaling in zip((g, x), scalings, strict=True)
    )
    return OPERATORS[ends.device.type].weights(left, right, ends, dtype)


@register_fake(_fp8_weights)
def _(
    g: list[Tensor], x: list[Tensor], tiles: list[int], powers: list[bool], ends: Tensor, dtype: torch.dtype
) -> Tensor:
    return g[0].new_empty(len(ends), g[0].shape[1], x[0].shape[1], dtype=dtype)


@operator("shoestring::fp8_enter")
def _fp8_enter(
    given: list[Tensor], tile: list[int], powers: bool, source: Tensor, slots: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # One operator whether tokens have been quantised or not: a segment that is computed again may find them otherwise.
    scaling, (first, *scales) = Scaling((tile[0], tile[1]), powers), given
    tokens = Quantised(first, scales[0], scaling.tile) if scales else first
    kept, rows = OPERATORS[first.device.type].enter(tokens, scaling, Copies(source, slots, starts))
    # What an operator was given it must not give back.
    return *((each.new_empty(0) for each in kept[:2]) if scales else kept[:2]), *rows[:2]


@register_fake(_fp8_enter)
def _(
    given: list[Tensor], tile: list[int], powers: bool, source: Tensor, slots: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values, scales = _outline(given[0], given[0].shape, tile) if len(given) == 1 else given
    length = source.shape[0]
    rows = values.new_empty(length, values.shape[1]), scales.new_empty(length, scales.shape[1])
    return *((values, scales) if len(given) == 1 else (each.new_empty(0) for each in given)), *rows


@operator("shoestring::fp8_activate")
def _fp8_activate(both: Tensor, share: Tensor, tile: list[int], powers: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inner, hidden = OPERATORS[both.device.type].activate(both, share, Scaling((tile[0], tile[1]), powers))
    return *inner[:2], *hidden[:2]


@register_fake(_fp8_activate)
def _(both: Tensor, share: Tensor, tile: list[int], powers: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = both.shape
    return *_outline(both, both.shape, tile), *_outline(both, [rows, columns // 2], tile)


@operator("shoestring::fp8_differentiate")
def _fp8_differentiate(
    g: Tensor, values: Tensor, scales: Tensor, share: Tensor, tile: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return OPERATORS[g.device.type].differentiate(g, Quantised(values, scales, (tile[0], tile[1])), share)


@register_fake(_fp8_differentiate)
def _(g: Tensor, values: Tensor, scales: Tensor, share: Tensor, tile: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    return scales.new_empty(values.shape), scales.new_empty(g.shape), scales.new_empty(g.shape[0])


def quantise(x: Tensor, scaling: Scaling) -> Quantised:
    """x [..., R, C], by tiles of its last two dims."""
    values, scales = _fp8_quantise(x, list(scaling.tile), scaling.powers)
    return Quantised(values, scales, scaling.tile)


def multiply(a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
    """a [M, K], b [N, K] -> a b^T [M, N]."""
    return _fp8_multiply([*a[:2], *b[:2]], [*a.tile, *b.tile], dtype)


def multiply_rows(a: Quantised, b: Quantised, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """a [P, K], b [E, N, K] -> [P, N], run by run."""
    return _fp8_rows([*a[:2], *b[:2]], [*a.tile, *b.tile], ends, dtype)


def multiply_weights(g: Operand, x: Operand, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """g [P, O], x [P, I] -> [E, O, I], run by run."""
    left, right = ([each.rows] if isinstance(each.rows, Tensor) else list(each.rows[:2]) for each in (g, x))
    tiles, powers = [*g.scaling.tile, *x.scaling.tile], [g.scaling.powers, x.scaling.powers]
    return _fp8_weights(left, right, tiles, powers, ends, dtype)


def enter(tokens: Tensor | Quantised, scaling: Scaling, copies: Copies) -> tuple[Quantised, Quantised]:
    """tokens [R, H] -> themselves and rows [P, H], quantised."""
    given = [tokens] if isinstance(tokens, Tensor) else list(tokens[:2])
    values, scales, copied, copied_scales = _fp8_enter(given, list(scaling.tile), scaling.powers, *copies)
    kept = Quantised(values, scales, scaling.tile) if isinstance(tokens, Tensor) else tokens
    return kept, Quantised(copied, copied_scales, (1, scaling.tile[1]))


def activate(both: Tensor, share: Tensor, scaling: Scaling) -> tuple[Quantised, Quantised]:
    """both [P, 2F], share [P] -> both and hidden [P, F], quantised."""
    values, scales, hidden, hidden_scales = _fp8_activate(both, share, list(scaling.tile), scaling.powers)
    return Quantised(values, scales, scaling.tile), Quantised(hidden, hidden_scales, scaling.tile)


def differentiate(g: Tensor, inner: Quantised, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """g [P, F], inner [P, 2F], share [P] -> g of both [P, 2F], hidden [P, F], g of share [P]."""
    return _fp8_differentiate(g, *inner[:2], share, list(inner.tile))


def _unpack(operands: list[Tensor], tiles: list[int]) -> tuple[Quantised, Quantised]:
    """What operators take as lists."""
    a, a_scales, b, b_scales = operands
    return Quantised(a, a_scales, (tiles[0], tiles[1])), Quantised(b, b_scales, (tiles[2], tiles[3]))
