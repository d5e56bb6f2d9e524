"""Linear: its two gradients, fused weights, and the weight gradient put off."""

from typing import Any

import pytest
import torch
from small_models import check_gradients
from torch.utils._python_dispatch import TorchDispatchMode

from model.linear import Linear, LinearFunction, WeightGradient


def random(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("weight", [(5, 3), (2, 4, 3)])
@pytest.mark.parametrize("leading", [(7,), (2, 4), (1, 1, 1)])
def test_gradients(leading: tuple[int, ...], weight: tuple[int, ...]) -> None:
    assert check_gradients(lambda x, w: LinearFunction.apply(x, w, None), (random(*leading, 3), random(*weight)))


def test_a_fused_weight_keeps_its_parts_apart() -> None:
    linear = Linear(3, 2, 4)
    torch.nn.init.normal_(linear.weight)
    x = torch.randn(5, 3)
    gate, up = linear(x).chunk(2, dim=-1)
    torch.testing.assert_close(gate, x @ linear.weight[0].t())
    torch.testing.assert_close(up, x @ linear.weight[1].t())
    assert linear.weight.shape == (2, 4, 3)


def test_a_deferred_weight_gradient_leaves_the_input_gradient_as_it_was() -> None:
    x, weight = random(2, 4, 3), random(2, 5, 3)
    deferred: list[WeightGradient] = []
    upstream = random(2, 4, 10).detach()
    LinearFunction.apply(x, weight, deferred).backward(upstream)
    gx, x.grad = x.grad, None
    assert weight.grad is None and len(deferred) == 1 and deferred[0].weight is weight
    LinearFunction.apply(x, weight, None).backward(upstream)
    assert x.grad is not None and weight.grad is not None
    assert torch.equal(gx, x.grad)
    assert torch.equal(deferred[0].compute(), weight.grad)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("needed", "products"), [((True, True), 2), ((True, False), 1), ((False, True), 1)])
def test_a_gradient_nobody_needs_costs_no_product(needed: tuple[bool, bool], products: int) -> None:
    x, weight = (t.detach().requires_grad_(n) for t, n in zip((random(4, 3), random(5, 3)), needed, strict=True))
    deferred: list[WeightGradient] = []
    y = LinearFunction.apply(x, weight, deferred)
    with Products() as mode:
        y.sum().backward()
        for _, compute in deferred:
            compute()
    assert mode.count == products
    assert (x.grad is not None) == needed[0] and len(deferred) == needed[1]
