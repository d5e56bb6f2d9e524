"""Checks of the kernels of model/kernels against their references, in Triton's interpreter or on a GPU (tests/gpu)."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from model.config import MoEConfig
from model.exchange import SUMS, Layout, lay_out, sum_copies, unpermute
from model.experts import Experts
from model.fp8 import DEEPSEEK_V3, FORMATS, MXFP8, Quantised, Scaling, dequantise
from model.fp8 import quantise as reference
from model.fp8_experts import FP8Experts
from model.fp8_linear import FP8Linear
from model.fp8_ops import OPERATORS, REFERENCE, Operand
from model.kernels import copies, operators, product, quantisation, swiglu
from model.kernels.tile import Tile
from model.linear import Linear
from model.router import CHOICES, choose

CPU = FORMATS["cpu"]
DEVICE, ROUNDING = "cpu", 1e-6
TABLES: tuple[dict[str, Any], ...] = OPERATORS, SUMS, CHOICES
ROWS = {which: [table[which] for table in TABLES] for which in ("cpu", "cuda")}


@contextmanager
def run_as(which: str) -> Iterator[None]:
    """What runs on ``DEVICE`` is the row ``which`` of the tables."""
    before = [table[DEVICE] for table in TABLES]
    try:
        for table, row in zip(TABLES, ROWS[which], strict=True):
            table[DEVICE] = row
        yield
    finally:
        for table, row in zip(TABLES, before, strict=True):
            table[DEVICE] = row


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values over many orders of magnitude, row by row."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.randint(-6, 5, (*shape[:-1], 1), generator=generator)
    return (torch.randn(shape, generator=generator) * sizes).to(DEVICE, dtype)


def same(ours: Quantised, theirs: Quantised) -> None:
    """To the bit; NaN is NaN."""
    assert ours.tile == theirs.tile and ours.values.shape == theirs.values.shape
    assert torch.equal(ours.scales.nan_to_num(-1.0), theirs.scales.nan_to_num(-1.0)), "scales"
    left, right = (q.values.float().nan_to_num(-1.0) for q in (ours, theirs))
    assert torch.equal(left, right), "values"


def check_quantise(shape: list[int], tile: list[int], powers: bool, chip: str, dtype: str) -> None:
    form, scaling = FORMATS[chip], Scaling((tile[0], tile[1]), powers)
    x = draw(*shape, dtype=getattr(torch, dtype))
    for each in (x, x.mT, x[..., 1:, ::2], spoil(x)):
        same(quantisation.quantise(each, scaling, form), reference(each, scaling, form))


def spoil(x: Tensor) -> Tensor:
    """With zeros, an infinity, a NaN and what is too small for a scale."""
    x = x.clone()
    if x.numel():
        flat = x.view(-1)
        flat[: len(flat) // 3] = 0
        flat[len(flat) // 2], flat[-1], flat[0] = torch.inf, torch.nan, 1e-38
    return x


def near(ours: Tensor, theirs: Tensor) -> None:
    """As near as float32 sums in another order are; and nothing that is not finite is lost."""
    finite = theirs.isfinite()
    assert torch.equal(ours.isfinite(), finite)
    size = theirs[finite].double().norm().clamp(min=1e-30)
    assert float((ours[finite].double() - theirs[finite].double()).norm() / size) < ROUNDING


SMALL = (Tile(16, 16, 128, 4, 1), Tile(32, 64, 128, 4, 1))  # of products, two ways to cut the output


def pretend() -> None:
    """A chip for the interpreter."""
    operators.TILES["cpu"] = operators.Cuts(SMALL[:1], SMALL[1:])
    operators.find_chip = lambda device: "cpu"  # type: ignore[assignment]


def check_multiply(rows: int, columns: int, depth: int, blocks: bool) -> None:
    """Tiles of 128 by blocks or by tiles, and microscaling, in two configurations."""
    for c in (128, 32):
        a = reference(draw(rows, depth), Scaling((1, c), c == 32), CPU)
        b = reference(draw(columns, depth, seed=1), Scaling((c if blocks else 1, c), c == 32), CPU)
        made = [product.multiply_rows(a, b, None, torch.float32, tile._replace(depth=c)) for tile in SMALL]
        for each in made:
            near(each, REFERENCE.multiply(a, b, torch.float32))


def ends_of(sizes: tuple[int, ...]) -> Tensor:
    return torch.tensor(sizes, device=DEVICE).cumsum(0).int()


def check_rows(sizes: tuple[int, ...], spare: int, columns: int, depth: int) -> None:
    """Runs of any length, empty ones among them, and rows after the last."""
    ends, rows = ends_of(sizes), sum(sizes) + spare
    a = reference(draw(rows, depth), Scaling((1, 128)), CPU)
    b = reference(draw(len(sizes), columns, depth, seed=1), Scaling((128, 128)), CPU)
    made = [product.multiply_rows(a, b, ends, torch.float32, tile) for tile in SMALL]
    for each in made:
        assert not each[sum(sizes) :].any()
        near(each, REFERENCE.rows(a, b, ends, torch.float32))


def check_runs(sizes: tuple[int, ...], spare: int, columns: int, powers: bool) -> None:
    """Each run along its rows, as the reference quantises it alone; from values in 8 bits as well."""
    ends, x = ends_of(sizes), spoil(draw(sum(sizes) + spare, columns))
    kept = reference(x, Scaling((1, 128), True), CPU)
    for given, rows in ((x, x), (kept, dequantise(kept))):
        made = quantisation.quantise_runs(given, ends, 128, (powers, CPU))
        first = 0
        for start, end in pairwise([0, *ends.tolist()]):
            tiles = -(-(end - start) // 128)
            theirs = reference(rows[start:end].t(), Scaling((1, 128), powers), CPU)
            slots = slice(128 * first, 128 * first + end - start)
            ours = Quantised(made.values[:, slots], made.scales[:, first : first + tiles], (1, 128))
            same(ours, theirs._replace(scales=theirs.scales[:, :tiles]))
            pad = made.values[:, slots.stop : 128 * (first + tiles)]
            assert not (pad.float().nan_to_num(0.0)).any()
            first += tiles


def check_weights(sizes: tuple[int, ...], spare: int, outputs: int, inputs: int) -> None:
    ends, rows = ends_of(sizes), sum(sizes) + spare
    g, x = Operand(draw(rows, outputs), Scaling((1, 128))), Operand(draw(rows, inputs, seed=1), Scaling((1, 128), True))
    ours = [quantisation.quantise_runs(each.rows, ends, 128, (each.scaling.powers, CPU)) for each in (g, x)]
    made = [product.multiply_weights(*ours, ends, torch.float32, tile) for tile in SMALL]
    for each in made:
        near(each, REFERENCE.weights(g, x, ends, torch.float32))


def route(tokens: int, experts: int, choices: int) -> Layout:
    """Random choices, padded to 4 rows an expert."""
    generator = torch.Generator().manual_seed(3)
    chosen = [torch.randperm(experts, generator=generator)[:choices] for _ in range(tokens)]
    flat = torch.stack(chosen).flatten() if chosen else torch.zeros(0, dtype=torch.int64)
    owners = torch.arange(tokens, device=DEVICE).repeat_interleave(choices)
    return lay_out(flat.to(DEVICE), owners, tokens, experts, 4)


def nearly(ours: Quantised, theirs: Quantised) -> None:
    """To a neighbouring code where a value lay between two: what is quantised is computed, not given."""
    assert ours.tile == theirs.tile
    left, right = dequantise(ours), dequantise(theirs)
    assert torch.equal(left.isfinite(), right.isfinite())
    torch.testing.assert_close(ours.scales, theirs.scales, rtol=1e-5, atol=0, equal_nan=True)
    left, right = left.nan_to_num(0.0), right.nan_to_num(0.0)
    wrong = (left - right).abs() > 1e-5 * right.abs()
    assert int(wrong.sum()) <= 1e-3 * wrong.numel()
    if left.numel():
        step = 0.13 * right.abs() + theirs.scales.nan_to_num(1.0).max() * 2**-9
        assert bool(((left - right).abs() <= step).all())


def check_swiglu(rows: int, ffn: int, c: int, dtype: str) -> None:
    scaling = Scaling((1, c), c == 32)
    both = 3 * normal(rows, 2 * ffn, seed=1, dtype=getattr(torch, dtype))
    share = uniform(rows, seed=2)
    if rows > 4:
        both[1, 3], both[2, ffn + 1], share[3] = torch.nan, torch.inf, 0.0
    made, expected = swiglu.activate(both, share, scaling, CPU), REFERENCE.activate(both, share, scaling)
    same(made[0], expected[0])
    nearly(made[1], expected[1])
    g = draw(rows, ffn, seed=4)
    for ours, theirs in zip(
        swiglu.differentiate(g, expected[0], share), REFERENCE.differentiate(g, expected[0], share), strict=True
    ):
        assert ours.shape == theirs.shape
        near(ours, theirs)


def check_copies(tokens: int, width: int, experts: int, choices: int, dtype: str) -> None:
    """Entering, the sum over copies, and its gradient."""
    layout, kind = route(tokens, experts, choices), getattr(torch, dtype)
    source, slots, starts = layout.copies
    x = draw(tokens, width, dtype=kind)
    for scaling in (Scaling((1, 128), True), Scaling((1, 32), True), Scaling((1, 128))):
        expected, copied = REFERENCE.enter(x, scaling, layout.copies)
        for given in (x, expected):
            kept, rows = copies.enter(given, layout.copies, (scaling, CPU))
            same(kept, expected)
            assert torch.equal(dequantise(rows), dequantise(copied))
    rows = normal(len(source), width, seed=5, dtype=kind)
    gates = uniform(len(slots), seed=6)
    rounding = {"float32": 1e-6, "bfloat16": 2**-7}[dtype]
    for weights in (None, gates):
        ours = copies.sum_copies(rows, slots, starts, weights)
        theirs = sum_copies(rows.float(), slots, starts, weights)
        torch.testing.assert_close(ours.float(), theirs, rtol=rounding, atol=rounding)
    inputs = rows.float().requires_grad_(), gates.requires_grad_()
    g = normal(tokens, width, seed=7, dtype=kind)
    expected_grads = torch.autograd.grad(unpermute(*inputs, layout.copies), inputs, g.float())
    for ours, theirs in zip(copies.weigh_back(g, rows, gates.detach(), layout.copies), expected_grads, strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=rounding, atol=16 * rounding)


def check_router(tokens: int, moe: dict[str, Any]) -> None:
    config = MoEConfig(**moe)
    scores = normal(tokens, config.experts, seed=8)
    with run_as("cpu"):
        expected = choose(scores, config)
    with run_as("cuda"):
        assert torch.equal(choose(scores, config), expected)
    if tokens:
        scores[0, 1], scores[0, 2] = torch.nan, -torch.inf
        with run_as("cuda"):
            found = choose(scores, config)
        assert 1 in found[0] and int(found.min()) >= 0 and int(found.max()) < config.experts
        assert all(len(set(line.tolist())) == config.top_k for line in found)


def check_modules(recipe: str, tokens: int, dtype: str, width: int = 256) -> None:
    """Linear and experts, forward and backward, through kernels as through the reference."""
    if DEVICE == "cpu":
        pretend()
    rounded = {"fp8": DEEPSEEK_V3, "mxfp8": MXFP8}[recipe]
    kind = getattr(torch, dtype)
    plain, fused = Experts(4, width, 128).to(DEVICE, kind), Linear(width, 2, 128).to(DEVICE, kind)
    with torch.no_grad():
        for seed, parameter in enumerate((*plain.parameters(), *fused.parameters())):
            parameter.copy_(0.1 * normal(*parameter.shape, seed=seed))
    experts, linear = FP8Experts(plain, rounded), FP8Linear(fused, rounded)
    layout = route(tokens, 4, 2)
    x = normal(tokens, width, seed=9, dtype=kind).requires_grad_()
    gates = uniform(len(layout.copies.slots), seed=10).requires_grad_()
    inputs = [x, gates, *experts.parameters(), linear.weight]

    def run() -> list[Tensor]:
        out, beside = experts(x, gates, layout), linear(x)
        g = [normal(*each.shape, seed=11, dtype=kind) for each in (out, beside)]
        return [out, beside, *torch.autograd.grad([out, beside], inputs, g)]

    with run_as("cpu"):
        expected = run()
    with run_as("cuda"):
        made = run()
    for ours, theirs in zip(made, expected, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        ours, theirs = ours.detach().double(), theirs.detach().double()
        assert float((ours - theirs).norm()) <= 4e-3 * float(theirs.norm())
