"""FP8 as DeepSeek-V3 trains with it (arXiv 2412.19437, section 3.3), in plain torch: the reference of every kernel.

    tile     1 x 128 values that share a scale, along what a product sums over: activations and gradients
    block    128 x 128 values that do: weights
    scale    largest magnitude of the tile / 448, taken from the tile itself; a power of two where a recipe says so
    value    x / scale, rounded to E4M3

    forward          y  = x W^T      x by tiles along inputs      W by blocks
    input gradient   gx = gy W       gy by tiles along outputs    W by blocks
    weight gradient  gW = gy^T x     gy and x by tiles along tokens; x is what the forward kept in FP8, quantised anew

Sums are in float32 from first to last, or in float64 where inputs are: what tensor cores approach by promoting their
short sums every 128 terms (section 3.3.2). Sizes need not be multiples of anything: the last tile is a shorter one.

What is not finite stays visible: the scale of its tile is NaN, and so is all of the tile (a cast alone would make 448
of an infinity). A tile of zeros is zeros. Magnitudes below 448 times the least scale lose bits as subnormals do.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


class Format(NamedTuple):
    """An 8-bit format and its largest magnitude."""

    dtype: torch.dtype
    maximum: float


# One row per chip. MI300 has no zero of its own sign, and half the range.
FORMATS = {
    "cpu": Format(torch.float8_e4m3fn, 448.0),
    "cuda": Format(torch.float8_e4m3fn, 448.0),
    "gfx942": Format(torch.float8_e4m3fnuz, 240.0),
}
LEAST = 2.0**-126  # the least scale: a normal number of float32
Tile = tuple[int, int]


def find_format(device: torch.device) -> Format:
    """Of the chip that ``device`` is."""
    if device.type == "cuda" and torch.version.hip and "gfx942" in torch.cuda.get_device_properties(device).gcnArchName:
        return FORMATS["gfx942"]
    return FORMATS[device.type]


class Scaling(NamedTuple):
    """What shares a scale: ``tile`` rows and columns, or all of a tensor that has fewer; ``powers``: scales are powers
    of two, rounded up.
    """

    tile: Tile
    powers: bool = False

    def rounded(self) -> "Scaling":
        """The same with powers of two: what is quantised anew with these loses nothing but what gets too small."""
        return self._replace(powers=True)


class Recipe(NamedTuple):
    """How operands are scaled. Columns are what a product sums over."""

    activations: Scaling = Scaling((1, 128))
    gradients: Scaling = Scaling((1, 128))
    weights: Scaling = Scaling((128, 128))


DEEPSEEK_V3 = Recipe()
MXFP8 = Recipe(*3 * (Scaling((1, 32), powers=True),))  # OCP Microscaling Formats (MX), version 1.0


class Quantised(NamedTuple):
    """What a tensor [..., R, C] became."""

    values: Tensor  # [..., R, C], 8 bits each
    scales: Tensor  # [..., tiles of R, tiles of C], float32 or wider: the dtype that sums are taken in
    tile: Tile


def quantise(x: Tensor, scaling: Scaling, form: Format | None = None) -> Quantised:
    """x [..., R, C], by tiles of its last two dims."""
    form = form or find_format(x.device)
    if x.stride(-1) != 1 and x.stride(-2) == 1:  # read as it lies in memory
        values, scales, _ = quantise(x.mT, Scaling(scaling.tile[::-1], scaling.powers), form)
        return Quantised(values.mT, scales.mT, scaling.tile)
    tiles, size = _cut(x.to(torch.promote_types(x.dtype, torch.float32)), scaling.tile)
    scales = find_scales(tiles.abs().amax((-3, -1)), form.maximum, scaling.powers)
    values = tiles / _spread(scales)
    return Quantised(_join(values, size).to(form.dtype), scales, scaling.tile)


def find_scales(largest: Tensor, maximum: float, powers: bool) -> Tensor:
    """Largest magnitudes of tiles -> their scales; NaN where something in a tile is not finite."""
    scales = (largest / maximum).clamp(min=LEAST)
    if powers:
        mantissa, exponent = torch.frexp(scales)  # mantissa in [0.5, 1)
        scales = torch.ldexp(torch.ones_like(scales), exponent - (mantissa == 0.5).to(exponent.dtype))
    return scales.where(largest.isfinite(), torch.nan)


def dequantise(quantised: Quantised) -> Tensor:
    """The values in the dtype of the scales, [..., R, C]."""
    values, scales, tile = quantised
    if values.dtype is torch.float8_e4m3fn:
        values, scales = widen(values), scales * 2.0**8
    tiles, size = _cut(values.to(scales.dtype), tile)
    return _join(tiles * _spread(scales), size)


def widen(values: Tensor) -> Tensor:
    """E4M3 -> 2^-8 times the same in half precision, which has these bits and room for more. A CPU's own conversion
    takes eight times as long.
    """
    bits = values.view(torch.int8).to(torch.int16).bitwise_left_shift_(7)  # the sign fills bits 14 and 15
    nan = (bits & 0x3F80).add_(0x80).bitwise_and_(0x4000)  # of 0x7F alone; completes the exponent of what means NaN
    return bits.bitwise_and_(-0x4001).bitwise_or_(nan).view(torch.float16)


def _spread(scales: Tensor) -> Tensor:
    """[..., tiles of R, tiles of C] -> one for each tile as ``_cut`` gives them."""
    return scales.unsqueeze(-1).unsqueeze(-3)


def _cut(x: Tensor, tile: Tile) -> tuple[Tensor, tuple[int, int]]:
    """[..., R, C] -> [..., tiles of R, r, tiles of C, c], filled up with zeros; and (R, C)."""
    rows, columns = x.shape[-2:]
    r, c = min(tile[0], max(rows, 1)), min(tile[1], max(columns, 1))
    if rows % r or columns % c:
        x = F.pad(x, (0, -columns % c, 0, -rows % r))
    return x.unflatten(-1, (-1, c)).unflatten(-3, (-1, r)), (rows, columns)


def _join(tiles: Tensor, size: tuple[int, int]) -> Tensor:
    """The way back."""
    return tiles.flatten(-4, -3).flatten(-2)[..., : size[0], : size[1]]
