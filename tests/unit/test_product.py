"""Products on a processor without units for BF16: in float32, rounded once; wherever the model multiplies."""

import ast
from pathlib import Path

import pytest
import torch
from small_models import make_batch, make_config, make_denominators
from torch import Tensor

from model import product
from model.build import build
from model.config import Recompute

ROOT = Path(__file__).parents[2]
SHAPES = {"matrices": ((5, 7), (7, 3)), "a batch by a matrix": ((2, 5, 7), (7, 3)), "batches": ((2, 5, 7), (2, 7, 3))}


def draw(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize(("left", "right"), SHAPES.values(), ids=SHAPES)
def test_a_product_is_rounded_once(
    monkeypatch: pytest.MonkeyPatch, left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    monkeypatch.setattr(product, "HAS_UNITS", False)
    a, b = draw(left).requires_grad_(), draw(right, 1).requires_grad_()
    made = product.matmul(a, b)
    exact = a.double() @ b.double()
    assert torch.equal(made, exact.float().bfloat16())
    into = torch.empty_like(made)
    product.matmul_into(into, a.detach(), b.detach())
    assert torch.equal(into, made)
    g = draw(tuple(made.shape), 2)
    for ours, theirs in zip(
        torch.autograd.grad(made, [a, b], g), torch.autograd.grad(exact, [a, b], g.double()), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-7)


def test_a_product_is_added_and_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "HAS_UNITS", False)
    a, b, total = draw((2, 5, 7)), draw((2, 7, 3), 1), draw((2, 5, 3), 2)
    expected = (total.double() + a.double() @ b.double()).float().bfloat16()
    product.add_product(total, a, b)
    assert torch.equal(total, expected)


def test_other_dtypes_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "HAS_UNITS", False)
    monkeypatch.setattr(product, "_matmul_wide", None)
    for dtype in (torch.float32, torch.float64):
        a, b = draw((5, 7)).to(dtype), draw((7, 3), 1).to(dtype)
        assert torch.equal(product.matmul(a, b), a @ b)


@pytest.mark.parametrize("recompute", Recompute)
def test_a_model_trains_in_bf16_without_units(monkeypatch: pytest.MonkeyPatch, recompute: Recompute) -> None:
    """Near the same model in float32, with a gradient for every parameter."""
    config = make_config(recompute=recompute)
    batch, denominators = make_batch(config), make_denominators(config)
    with torch.no_grad():
        expected = build(config, torch.float32, "cpu", 0)(batch, denominators).total
    monkeypatch.setattr(product, "HAS_UNITS", False)
    model = build(config, torch.bfloat16, "cpu", 0)
    made = model(batch, denominators).total
    made.backward()
    assert float(made.detach()) == pytest.approx(float(expected), rel=2e-2)
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


# Elsewhere: the plain products of float32 and float64 that FP8 is checked with, and the last token's when generating.
OWN = {"model/product.py", "model/fp8_ops.py", "model/transformer.py"}
CALLS = {"mm", "bmm", "matmul", "addmm", "addmm_", "baddbmm", "baddbmm_"}


def test_the_model_multiplies_nowhere_else() -> None:
    for path in (path for room in ("model", "parallel") for path in (ROOT / room).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name in OWN or "/kernels/" in name:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            assert not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.MatMult), (name, node.lineno)
            if isinstance(called, ast.Attribute):
                assert called.attr not in CALLS, (name, node.lineno)
