"""The table of what runs on which GPU, without one: torch's products are called as their documentation wants them."""

from typing import Any

import pytest
import torch
from small_models import make_batch, make_config, make_denominators
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import ScalingType, SwizzleType

from model import fp8
from model.batch import Batch
from model.build import outline
from model.fp8 import DEEPSEEK_V3, MXFP8, Quantised, Recipe, Scaling, dequantise
from model.fp8_ops import REFERENCE, Operand
from model.kernels import operators
from model.kernels.chips import CHIPS

WHOLE = Scaling((2**30, 2**30))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class ScaledProduct:
    """``torch.nn.functional.scaled_mm`` by its checks (aten/src/ATen/native/cuda/ScaledBlas.cpp), in float32."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, a: Tensor, b: Tensor, *given: Any, **options: Any) -> Tensor:
        scale_a, recipe_a, scale_b, recipe_b = given
        (m, k), n = a.shape, b.shape[1]
        self.calls += 1
        assert a.dtype == b.dtype == torch.float8_e4m3fn and a.stride() == (k, 1) and b.stride() == (1, k)
        assert k % 16 == n % 16 == 0, "cuBLAS wants multiples of 16 bytes"
        if recipe_a is ScalingType.BlockWise1x32:
            assert recipe_b is recipe_a
            assert options["swizzle_a"] is options["swizzle_b"] is SwizzleType.SWIZZLE_32_4_4
            left, right = unswizzle(scale_a, m, k // 32), unswizzle(scale_b, n, k // 32)
            tiles = (1, 32), (1, 32)
        else:
            assert recipe_a is ScalingType.BlockWise1x128 and m % 4 == 0
            assert scale_a.shape == (m, -(-k // 128)) and scale_a.stride() == (1, m)
            left, tiles = scale_a, ((1, 128), (1, 128))
            if recipe_b is ScalingType.BlockWise128x128:
                padded = -(-k // 512) * 4
                assert scale_b.shape == (padded, -(-n // 128)) and scale_b.stride() == (1, padded)
                right, tiles = scale_b.t()[:, : -(-k // 128)], ((1, 128), (128, 128))
            else:
                assert recipe_b is recipe_a and scale_b.shape == (n, -(-k // 128)) and scale_b.stride() == (1, n)
                right = scale_b
        product = dequantise(Quantised(a, left, tiles[0])) @ dequantise(Quantised(b.t(), right, tiles[1])).mT
        return product.to(options["output_dtype"])


def unswizzle(flat: Tensor, rows: int, columns: int) -> Tensor:
    """Scale (r, c) is where NVIDIA's documentation of cuBLAS has it."""
    assert flat.dtype is torch.float8_e8m0fnu and flat.is_contiguous()
    across = -(-columns // 4)
    assert flat.numel() == -(-rows // 128) * across * 512
    r, c = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    places = (r // 128 * across + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
    return flat.float()[places]


@pytest.mark.parametrize(
    ("chip", "a", "b"),
    [
        ("cuda:90", DEEPSEEK_V3.activations, DEEPSEEK_V3.weights),
        ("cuda:90", DEEPSEEK_V3.activations, DEEPSEEK_V3.activations),
        ("cuda:100", MXFP8.activations, MXFP8.weights),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(64, 48, 256), (4, 272, 640), (200, 16, 1024)], ids=str)
def test_torchs_products_get_what_they_want(
    monkeypatch: pytest.MonkeyPatch, chip: str, a: Scaling, b: Scaling, size: tuple[int, int, int]
) -> None:
    m, n, k = size
    product = ScaledProduct()
    monkeypatch.setattr(operators.F, "scaled_mm", product)
    monkeypatch.setattr(operators, "find_chip", lambda device: chip)
    left, right = fp8.quantise(draw(m, k), a), fp8.quantise(draw(n, k, seed=1), b)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(operators.multiply(left, right, dtype), REFERENCE.multiply(left, right, dtype))
    assert product.calls == 2


@pytest.mark.parametrize("size", [(63, 48, 256), (64, 40, 256), (64, 48, 200), (0, 48, 256)], ids=str)
def test_sizes_that_torchs_products_refuse_are_ours(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int, int]
) -> None:
    m, n, k = size
    seen = []
    monkeypatch.setattr(operators, "find_chip", lambda device: "cuda:90")
    monkeypatch.setattr(operators.product, "multiply_rows", lambda *args: seen.append(args))
    a, b = fp8.quantise(draw(m, k), DEEPSEEK_V3.activations), fp8.quantise(draw(n, k), DEEPSEEK_V3.weights)
    operators.multiply(a, b, torch.bfloat16)
    assert len(seen) == 1 and seen[0][2] is None and seen[0][4] == operators.TILES["cuda:90"].blocks[0]


def test_every_choice_has_a_reason_and_every_chip_tiles() -> None:
    assert all(native.reason for native in operators.NATIVE.values())
    for chip, cuts in operators.TILES.items():
        for tile in (*cuts.blocks, *cuts.lines):
            step = (tile.rows + tile.columns) * tile.depth
            shared = step * (1 if chip.startswith("hip") else tile.stages)
            assert shared <= CHIPS[chip].shared, (chip, tile)
    assert operators.choose_tile("cuda:120", (1, 32)).depth == 32, "a chip that is not in the table"


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [
        (Recipe(WHOLE, WHOLE, WHOLE), torch.float32),
        (DEEPSEEK_V3._replace(gradients=Scaling((128, 128))), torch.float32),
        (DEEPSEEK_V3, torch.float64),
    ],
    ids=["a scale a tensor", "gradients by blocks", "float64"],
)
def test_what_no_kernel_takes_runs_in_plain_torch(
    monkeypatch: pytest.MonkeyPatch, recipe: Recipe, dtype: torch.dtype
) -> None:
    """To the bit; a kernel would fail here, where there is no GPU."""
    monkeypatch.setattr(operators, "find_chip", lambda device: "cuda:90")
    x, weight = draw(40, 256, dtype=dtype), draw(3, 130, 256, seed=1, dtype=dtype)
    ends = torch.tensor([16, 16, 33]).int()
    a, b = fp8.quantise(x, recipe.gradients), fp8.quantise(weight, recipe.weights)
    if recipe.activations is WHOLE or dtype is torch.float64:
        assert torch.equal(operators.quantise(x, recipe.gradients).scales, a.scales)
    one = Quantised(b.values[0], b.scales[0], b.tile)
    assert torch.equal(operators.multiply(a, one, dtype), REFERENCE.multiply(a, one, dtype))
    assert torch.equal(operators.rows(a, b, ends, dtype), REFERENCE.rows(a, b, ends, dtype))
    operands = Operand(x, recipe.gradients), Operand(x, recipe.activations)
    assert torch.equal(operators.weights(*operands, ends, dtype), REFERENCE.weights(*operands, ends, dtype))


@pytest.mark.parametrize("recipe", [DEEPSEEK_V3, MXFP8], ids=["fp8", "mxfp8"])
def test_a_step_has_its_shapes(recipe: Recipe) -> None:
    """Forward and backward on tensors without values: what every operator says it gives fits what reads it."""
    config = make_config(mtp=1)
    model, denominators = outline(config, torch.bfloat16, recipe=recipe), make_denominators(config)
    ids, counted, _ = make_batch(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                there = torch.empty(tensor.shape, dtype=tensor.dtype)
                setattr(module, name, nn.Parameter(there) if isinstance(tensor, nn.Parameter) else there)
        there = (torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in (ids, counted))
        losses = model(Batch(*there, None), denominators)
        losses.total.backward()
        assert losses.sums.shape == (2,)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.shape == parameter.shape, name
            assert parameter.grad.dtype is parameter.dtype
