"""Which product runs on which GPU, and where kernels take over: the row "cuda" of the table in model/fp8_ops.py.

    NATIVE    (chip, tile of a, tile of b) -> torch's own product, where it has one, and why
    TILES     chip -> how ours are cut; the first that a product may take is what runs

A chip is named as Triton names its targets: ``cuda:90`` is H100, ``cuda:100`` B200, ``hip:gfx942`` MI300X. What no
kernel takes (tiles above 128, blocks of activations, float64) runs as on a CPU, in plain torch.
Never run on a GPU; docs/kernels.md says what was checked instead.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType

from model import fp8
from model.exchange import Copies
from model.fp8 import Quantised, Scaling, find_format
from model.fp8 import Tile as Share
from model.fp8_ops import REFERENCE, Operand
from model.kernels import copies as copies_
from model.kernels import product, quantisation, swiglu
from model.kernels.tile import Tile

LINE, BLOCK, MICRO = (1, 128), (128, 128), (1, 32)
WIDE, NARROW = Tile(128, 128, 128, 8, 4), Tile(128, 64, 128, 8, 4)
AMD = WIDE._replace(stages=2)  # one step of 32 KiB in the 64 KiB of shared memory, and one in registers


class Cuts(NamedTuple):
    """Tiles of our products: where b's scales are those of blocks, and where each of its rows has its own."""

    blocks: tuple[Tile, ...]
    lines: tuple[Tile, ...]


# The first of each runs. Nothing has been timed: all fit without spilling, and are what benchmarks/gpu.py times.
# WIDE would not fit where every row of b has a scale of its own: on H100 it spills with Triton 3.7, not with 3.9.
NVIDIA = Cuts((WIDE, WIDE._replace(stages=3), NARROW), (NARROW, NARROW._replace(stages=3)))
TILES = {
    "cuda:90": NVIDIA,
    "cuda:100": NVIDIA,
    "hip:gfx942": Cuts((AMD, NARROW._replace(stages=2)), (AMD, NARROW._replace(stages=2))),
}


class Native(NamedTuple):
    """A product of torch's: whether it takes these operands, how it is called, and why it is preferred."""

    fits: Callable[[Quantised, Quantised], bool]
    multiply: Callable[[Quantised, Quantised, torch.dtype], Tensor]
    reason: str


def _fits_cublas(a: Quantised, b: Quantised) -> bool:
    (rows, depth), columns = a.values.shape, len(b.values)
    return rows % 4 == 0 and depth % 16 == 0 and columns % 16 == 0 and min(rows, depth, columns) > 0


def _fits_micro(a: Quantised, b: Quantised) -> bool:
    (rows, depth), columns = a.values.shape, len(b.values)
    return depth % 32 == 0 and columns % 16 == 0 and min(rows, depth, columns) > 0


def _multiply_blocks(a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
    """By cuBLAS, which wants scales of lines with rows side by side, those of blocks padded to fours along K."""
    scales = F.pad(b.scales, (0, -b.scales.shape[1] % 4)).t()
    return F.scaled_mm(
        a.values,
        b.values.t(),
        a.scales.t().contiguous().t(),
        ScalingType.BlockWise1x128,
        scales,
        ScalingType.BlockWise128x128,
        output_dtype=dtype,
    )


def _multiply_lines(a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
    kind = ScalingType.BlockWise1x128
    scales = [each.scales.t().contiguous().t() for each in (a, b)]
    return F.scaled_mm(a.values, b.values.t(), scales[0], kind, scales[1], kind, output_dtype=dtype)


def swizzle(scales: Tensor) -> Tensor:
    """Powers of two [R, C] -> the exponents in the order of Blackwell's units, blocks of 128 rows by 4, flat.

    Within a block row r is at 16 (r % 32) + 4 (r // 32): cuBLAS, "1D block scaling factors layout".
    """
    rows, columns = scales.shape
    padded = F.pad(scales, (0, -columns % 4, 0, -rows % 128), value=1.0).to(torch.float8_e8m0fnu).view(torch.uint8)
    blocks = padded.unflatten(0, (-1, 4, 32)).unflatten(-1, (-1, 4))  # [R / 128, 4, 32, C / 4, 4]
    return blocks.permute(0, 3, 2, 1, 4).flatten().contiguous().view(torch.float8_e8m0fnu)


def _multiply_micro(a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
    kind, order = ScalingType.BlockWise1x32, SwizzleType.SWIZZLE_32_4_4
    return F.scaled_mm(
        a.values,
        b.values.t(),
        swizzle(a.scales),
        kind,
        swizzle(b.scales),
        kind,
        swizzle_a=order,
        swizzle_b=order,
        output_dtype=dtype,
    )


NATIVE = {
    ("cuda:90", LINE, BLOCK): Native(_fits_cublas, _multiply_blocks, "cuBLAS has it for Hopper alone, since CUDA 12.9"),
    ("cuda:90", LINE, LINE): Native(_fits_cublas, _multiply_lines, "the same"),
    ("cuda:100", MICRO, MICRO): Native(_fits_micro, _multiply_micro, "the units scale by themselves, at full speed"),
}
# What torch 2.13 has for experts in FP8 (``scaled_grouped_mm``) knows neither lines nor blocks of 128, and microscaling
# with scales that are padded and turned expert by expert, where the host would have to know how long runs are.


@cache
def find_chip(device: torch.device) -> str:
    """As Triton names it."""
    if torch.version.hip:
        return "hip:" + torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda:{major}{minor}"


def choose_tile(chip: str, share: Share) -> Tile:
    """For a product whose second operand has scales of ``share``; a chip that is not in the table gets the smallest."""
    cuts = TILES.get(chip, TILES["hip:gfx942"])
    return (cuts.lines if share[0] == 1 else cuts.blocks)[0]._replace(depth=share[1])


def takes(scaling: Scaling, x: Tensor | Quantised) -> bool:
    """Whether kernels quantise x so."""
    dtype = x.dtype if isinstance(x, Tensor) else x.scales.dtype
    return dtype is not torch.float64 and all(n in (1, 32, 128) for n in scaling.tile) and scaling.tile[1] > 1


def _multiplies(a: Quantised, b: Quantised) -> bool:
    """Whether our products take a and b: scales along K, one for each row of a."""
    lines = a.tile[0] == 1 and a.tile[1] == b.tile[1] and b.tile[0] in (1, b.tile[1])
    return lines and a.tile[1] in (32, 128) and a.scales.dtype is torch.float32


def quantise(x: Tensor, scaling: Scaling) -> Quantised:
    """x [..., R, C], by tiles of its last two dims."""
    form = find_format(x.device)
    return quantisation.quantise(x, scaling, form) if takes(scaling, x) else fp8.quantise(x, scaling, form)


def multiply(a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
    """a [M, K], b [N, K] -> [M, N]."""
    chip = find_chip(a.values.device)
    native = NATIVE.get((chip, a.tile, b.tile))
    if native and native.fits(a, b):
        return native.multiply(a, b, dtype)
    if not _multiplies(a, b):
        return REFERENCE.multiply(a, b, dtype)
    return product.multiply_rows(a, b, None, dtype, choose_tile(chip, b.tile))


def rows(a: Quantised, b: Quantised, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """a [P, K], b [E, N, K], ends [E] -> [P, N]."""
    if not _multiplies(a, b):
        return REFERENCE.rows(a, b, ends, dtype)
    return product.multiply_rows(a, b, ends, dtype, choose_tile(find_chip(ends.device), b.tile))


def weights(g: Operand, x: Operand, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """g [P, O], x [P, I], ends [E] -> [E, O, I]."""
    shares, form = {g.scaling.tile, x.scaling.tile}, find_format(ends.device)
    share = shares.pop()
    if shares or share[0] > 1 or not all(takes(each.scaling, each.rows) for each in (g, x)):
        return REFERENCE.weights(g, x, ends, dtype)
    a, b = (quantisation.quantise_runs(each.rows, ends, share[1], (each.scaling.powers, form)) for each in (g, x))
    return product.multiply_weights(a, b, ends, dtype, choose_tile(find_chip(ends.device), share))


def enter(tokens: Tensor | Quantised, scaling: Scaling, copies: Copies) -> tuple[Quantised, Quantised]:
    """tokens [R, H] -> themselves and rows [P, H], quantised."""
    if scaling.tile[0] > 1 or not takes(scaling, tokens):
        return REFERENCE.enter(tokens, scaling, copies)
    tokens = tokens.contiguous() if isinstance(tokens, Tensor) else tokens
    return copies_.enter(tokens, copies, (scaling, find_format(copies.slots.device)))


def activate(both: Tensor, share: Tensor, scaling: Scaling) -> tuple[Quantised, Quantised]:
    """both [P, 2F], share [P] -> both and hidden [P, F], quantised."""
    fits = scaling.tile[0] == 1 and both.shape[1] % (2 * scaling.tile[1]) == 0
    if not fits or not takes(scaling, both):
        return REFERENCE.activate(both, share, scaling)
    return swiglu.activate(both, share, scaling, find_format(both.device))


def differentiate(g: Tensor, inner: Quantised, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """g [P, F], inner [P, 2F], share [P] -> g of both, hidden, g of share."""
    if inner.tile[0] > 1 or g.shape[1] % inner.tile[1] or inner.scales.dtype is torch.float64:
        return REFERENCE.differentiate(g, inner, share)
    return swiglu.differentiate(g, inner, share)
