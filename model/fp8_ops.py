"""What FP8 training computes, as operators: how each runs is one row per device type in ``OPERATORS``.

    quantise           x [..., R, C]                   -> values and scales, by tiles
    multiply           a [M, K], b [N, K]              -> a b^T [M, N]
    multiply_rows      a [P, K], b [E, N, K], ends     -> y [P, N], each expert's run of rows by its own matrix
    multiply_weights   g [P, O], x [P, I], ends        -> g^T x [E, O, I], a sum over each expert's run of rows

Operands of products have their scales along K. Sums over rows have no such tiles yet: ``multiply_weights`` quantises
its operands along rows itself, each run from its first row on. Runs end at ``ends`` [E] int32; rows past the last are
zero in every result. Sums are taken in the dtype of the scales; results are rounded to ``dtype`` once.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from model import fp8
from model.fp8 import Quantised, Scaling, dequantise
from model.grouped import PRODUCTS as GROUPED


class Operand(NamedTuple):
    """Rows [P, C], and how to quantise their columns [C, P]."""

    rows: Tensor
    scaling: Scaling


class Operators(NamedTuple):
    """All of them on one device type, with the arguments of the functions below."""

    quantise: Callable[[Tensor, Scaling], Quantised]
    multiply: Callable[[Quantised, Quantised, torch.dtype], Tensor]
    rows: Callable[[Quantised, Quantised, Tensor, torch.dtype], Tensor]
    weights: Callable[[Operand, Operand, Tensor, torch.dtype], Tensor]


def _multiply(a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
    return (dequantise(a) @ dequantise(b).mT).to(dtype)


def _multiply_rows(a: Quantised, b: Quantised, ends: Tensor, dtype: torch.dtype) -> Tensor:
    return GROUPED[ends.device.type].rows(dequantise(a), dequantise(b).mT, ends).to(dtype)


def _multiply_weights(g: Operand, x: Operand, ends: Tensor, dtype: torch.dtype) -> Tensor:
    out = g.rows.new_zeros(len(ends), g.rows.shape[1], x.rows.shape[1], dtype=dtype)
    start = 0
    for gradient, end in zip(out, ends.tolist(), strict=True):
        if end > start:
            left, right = (fp8.quantise(rows[start:end].t(), scaling) for rows, scaling in (g, x))
            gradient.copy_(_multiply(left, right, dtype))
        start = end
    return out


REFERENCE = Operators(fp8.quantise, _multiply, _multiply_rows, _multiply_weights)
OPERATORS = {"cpu": REFERENCE, "cuda": REFERENCE}  # on a GPU the same numbers, until its kernels are there


@torch.library.custom_op("shoestring::fp8_quantise", mutates_args=())
def _fp8_quantise(x: Tensor, tile: list[int], powers: bool) -> tuple[Tensor, Tensor]:
    values, scales, _ = OPERATORS[x.device.type].quantise(x, Scaling((tile[0], tile[1]), powers))
    return values.contiguous(), scales.contiguous()  # what is summed over lies side by side


@_fp8_quantise.register_fake
def _(x: Tensor, tile: list[int], powers: bool) -> tuple[Tensor, Tensor]:
    *others, rows, columns = x.shape
    tiles = [-(-size // min(length, max(size, 1))) for size, length in zip((rows, columns), tile, strict=True)]
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape, dtype=fp8.FORMATS[x.device.type].dtype), x.new_empty(*others, *tiles, dtype=wide)


@torch.library.custom_op("shoestring::fp8_multiply", mutates_args=())
def _fp8_multiply(operands: list[Tensor], tiles: list[int], dtype: torch.dtype) -> Tensor:
    return OPERATORS[operands[0].device.type].multiply(*_unpack(operands, tiles), dtype)


@_fp8_multiply.register_fake
def _(operands: list[Tensor], tiles: list[int], dtype: torch.dtype) -> Tensor:
    a, _, b, _ = operands
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


@torch.library.custom_op("shoestring::fp8_rows", mutates_args=())
def _fp8_rows(operands: list[Tensor], tiles: list[int], ends: Tensor, dtype: torch.dtype) -> Tensor:
    return OPERATORS[ends.device.type].rows(*_unpack(operands, tiles), ends, dtype)


@_fp8_rows.register_fake
def _(operands: list[Tensor], tiles: list[int], ends: Tensor, dtype: torch.dtype) -> Tensor:
    a, _, b, _ = operands
    return a.new_empty(a.shape[0], b.shape[1], dtype=dtype)


@torch.library.custom_op("shoestring::fp8_weights", mutates_args=())
def _fp8_weights(
    g: Tensor, x: Tensor, tiles: list[int], powers: list[bool], ends: Tensor, dtype: torch.dtype
) -> Tensor:
    left = Operand(g, Scaling((tiles[0], tiles[1]), powers[0]))
    right = Operand(x, Scaling((tiles[2], tiles[3]), powers[1]))
    return OPERATORS[g.device.type].weights(left, right, ends, dtype)


@_fp8_weights.register_fake
def _(g: Tensor, x: Tensor, tiles: list[int], powers: list[bool], ends: Tensor, dtype: torch.dtype) -> Tensor:
    return g.new_empty(len(ends), g.shape[1], x.shape[1], dtype=dtype)


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
    tiles = [*g.scaling.tile, *x.scaling.tile]
    return _fp8_weights(g.rows, x.rows, tiles, [g.scaling.powers, x.scaling.powers], ends, dtype)


def _unpack(operands: list[Tensor], tiles: list[int]) -> tuple[Quantised, Quantised]:
    """What operators take as lists."""
    a, a_scales, b, b_scales = operands
    return Quantised(a, a_scales, (tiles[0], tiles[1])), Quantised(b, b_scales, (tiles[2], tiles[3]))
