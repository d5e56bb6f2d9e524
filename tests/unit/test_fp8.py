"""Quantisation: each value is the nearest of its format, scales are the tile's, what is not finite shows."""

import math

import pytest
import torch
from torch import Tensor

from model.fp8 import DEEPSEEK_V3, FORMATS, LEAST, MXFP8, Quantised, Scaling, dequantise, quantise, widen
from training.config import TILES
from training.determinism import NUMERICS

E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
SCALINGS = {
    "tiles": Scaling((1, 128)),
    "blocks": Scaling((128, 128)),
    "powers": Scaling((1, 32), powers=True),
    "one scale": Scaling((2**30, 2**30)),
}
SHAPES = [(3, 256), (5, 300), (130, 129), (2, 7, 40), (1, 1), (0, 128), (3, 0)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Magnitudes of many orders."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(shape, generator=generator) * 3
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * spread.exp()).to(dtype)


def naive(x: Tensor, scaling: Scaling) -> Tensor:
    """One tile after the other, each value to the nearest that E4M3 has, ties to the even code."""
    out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    values = E4M3.double()
    codes = [code for code in range(256) if not values[code].isnan() and code != 0x80]
    table = values[codes]
    for matrix, result in zip(x.reshape(-1, *x.shape[-2:]), out.view(-1, *x.shape[-2:]), strict=True):
        for top in range(0, x.shape[-2], scaling.tile[0]):
            for left in range(0, x.shape[-1], scaling.tile[1]):
                region = slice(top, top + scaling.tile[0]), slice(left, left + scaling.tile[1])
                part = matrix[region].to(out.dtype)
                scale = max(float((part.abs().max() / 448).to(out.dtype)), LEAST)
                if scaling.powers:
                    scale = 2.0 ** math.ceil(math.log2(scale))
                wanted = (part / scale).double()
                far = (wanted[..., None] - table).abs() + 1e-30 * torch.tensor([code & 1 for code in codes])
                nearest = far.min(-1).values[..., None]
                even = (far == nearest).double() * torch.tensor([2.0 - (code & 1) for code in codes])
                result[region] = table[even.argmax(-1)].to(out.dtype) * torch.tensor(scale, dtype=out.dtype)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_value_is_the_nearest_that_the_format_has(
    shape: tuple[int, ...], scaling: Scaling, dtype: torch.dtype
) -> None:
    x = random(*shape, dtype=dtype)
    quantised = quantise(x, scaling)
    assert quantised.values.shape == x.shape and quantised.values.dtype is torch.float8_e4m3fn
    wide = torch.promote_types(dtype, torch.float32)
    assert quantised.scales.dtype is wide
    if x.numel():
        assert torch.equal(dequantise(quantised), naive(x, scaling))
    assert dequantise(quantised).shape == x.shape


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_what_lies_the_other_way_round_in_memory_is_the_same(scaling: Scaling) -> None:
    x = random(130, 260)
    here, there = quantise(x, scaling), quantise(x.t().contiguous().t(), scaling)
    assert torch.equal(dequantise(here), dequantise(there)) and torch.equal(here.scales, there.scales)


def test_zeros_are_zeros_beside_anything() -> None:
    x = random(4, 256)
    x[1], x[2, 128:] = 0, 0
    quantised = quantise(x, DEEPSEEK_V3.activations)
    assert not dequantise(quantised)[1].any() and not dequantise(quantised)[2, 128:].any()
    assert quantised.scales.isfinite().all() and (quantised.scales > 0).all()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_what_is_not_finite_spoils_its_tile_and_no_other(scaling: Scaling, bad: float) -> None:
    x = random(256, 256)
    expected = dequantise(quantise(x, scaling))
    x[3, 5] = bad
    rows, columns = (min(length, 256) for length in scaling.tile)
    inside = torch.zeros(256, 256, dtype=torch.bool)
    inside[3 // rows * rows : 3 // rows * rows + rows, :columns] = True
    found = dequantise(quantise(x, scaling))
    assert found[inside].isnan().all() and torch.equal(found[~inside], expected[~inside])


def test_magnitudes_near_the_ends_of_float32() -> None:
    x = torch.tensor([[3e38, 1.0], [1e-38, -2e-39], [0.0, 1e-45]])
    found = dequantise(quantise(x, Scaling((1, 128))))
    torch.testing.assert_close(found[0], torch.tensor([3e38, 0.0]), rtol=1e-6, atol=0)
    assert found.isfinite().all() and (found[1:].abs() <= 2 * x[1:].abs() + 448 * LEAST).all()


@pytest.mark.parametrize("scaling", [Scaling((1, 128), True), Scaling((1, 32), True), Scaling((128, 128), True)])
def test_powers_of_two_lose_nothing_when_quantised_anew(scaling: Scaling) -> None:
    """The scale is the least power of two under which the tile fits."""
    x = random(256, 256, dtype=torch.bfloat16)
    first = quantise(x, scaling)
    mantissa, _ = torch.frexp(first.scales)
    assert (mantissa == 0.5).all()
    largest = x.float().unflatten(-1, (-1, scaling.tile[1])).unflatten(0, (-1, scaling.tile[0])).abs().amax((1, 3))
    assert (largest <= 448 * first.scales).all() and (largest > 224 * first.scales).all()
    once = dequantise(first)
    assert torch.equal(dequantise(quantise(once, scaling)), once)
    assert torch.equal(once, once.bfloat16().float())
    exponents = first.scales.to(torch.float8_e8m0fnu)  # what travels
    assert torch.equal(exponents.float(), first.scales)


def test_widening_knows_every_code() -> None:
    found, expected = widen(E4M3).double() * 256, E4M3.double()
    assert torch.equal(found.isnan(), expected.isnan()) and expected.isnan().sum() == 2
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("chip", FORMATS)
def test_every_chip_keeps_its_largest(chip: str) -> None:
    form = FORMATS[chip]
    assert torch.finfo(form.dtype).max == form.maximum
    x = random(16, 256)
    quantised = quantise(x, DEEPSEEK_V3.activations, form)
    found = dequantise(quantised)
    assert quantised.values.dtype is form.dtype and found.isfinite().all()
    tiles = x.unflatten(-1, (-1, 128)).abs().amax(-1)
    torch.testing.assert_close(found.unflatten(-1, (-1, 128)).abs().amax(-1), tiles, rtol=1e-6, atol=0)


def test_a_stranger_s_nan_stays_one() -> None:
    values = torch.tensor([[0x7F, 0x38]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    found = dequantise(Quantised(values, torch.ones(1, 1), (1, 128)))
    assert found[0, 0].isnan() and found[0, 1] == 1


def test_what_configurations_call_a_tile_is_the_recipe_s() -> None:
    assert {p: n.recipe.activations.tile[1] for p, n in NUMERICS.items() if n.recipe is not None} == TILES
    assert all(scaling.powers for scaling in MXFP8)
